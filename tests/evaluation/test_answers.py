"""Answers found in text and compared as numbers: every gold answer of GSM8K, and what people and models write."""

import json
import sys
import time
from decimal import Decimal
from threading import Thread

import pytest
from conftest import DATA

from llada_trm_hf.data import load_reasoning_dataset
from llada_trm_hf.evaluation import answers_match, extract_answer
from llada_trm_hf.evaluation.scoring import score_output, scoring_kind


@pytest.fixture(scope="module")
def gsm8k():
    folder = DATA / "gsm8k"
    if not folder.exists():
        pytest.skip(f"no GSM8K in {folder}")
    lines = [line for name in ("train", "test") for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    return [json.loads(line)["answer"] for line in lines]


def gold(answer: str) -> str:
    """The number after the marker, read by nothing that is under test."""
    return answer[answer.rindex("#### ") + 5 :].strip()


def number(text: str) -> Decimal:
    return Decimal(text.replace(",", ""))


# {n} is the gold number as written, {p} without separators, {c} with, {t} in LaTeX, {m} with a minus sign of its own.
PHRASINGS = [
    "{steps}\nThe answer is {n}.",
    "{steps}\nTherefore, the final answer is \\(\\boxed{{{t}}}\\).",
    "{steps} So in the end that makes ${c}.",
    "{steps}\n\n**Final Answer:** {p}.00 dollars",
    "{steps}\n\nAnswer: {m} apples per day",
    "To get there we take 3 steps. {steps}\nThe correct answer, as shown above, is: **{c}**",
    "{steps}\n$$x = {t}$$\nHence the answer is $x = {t}$.",
    "{steps}\n### Final Answer\n\n{n} people are left",
    "<think>\nIs it 12? The answer is 12.\n</think>\n{steps}\n<answer>{p}</answer>",
    "{steps}\nThat is a total of {c} miles!",
]


def phrasings(answer: str) -> list[str]:
    n, steps = gold(answer), answer[: answer.rindex("####")].strip()
    p = n.replace(",", "")
    c = f"{int(p):,}"
    forms = {"n": n, "p": p, "c": c, "t": c.replace(",", "{,}"), "m": n.replace("-", "\u2212"), "steps": steps}
    return [phrasing.format(**forms) for phrasing in PHRASINGS]


def test_every_gold_answer_of_gsm8k(gsm8k):
    assert len(gsm8k) == 8792
    for answer in gsm8k:
        assert extract_answer(answer) == gold(answer)


def check_phrasings(answers: list[str]) -> None:
    for i, answer in enumerate(answers):
        for text in phrasings(answer):
            found = extract_answer(text)
            assert answers_match(found, gold(answer)), (found, text)
        other = gold(answers[i - 1])
        assert answers_match(found, other) == (number(other) == number(gold(answer)))


def test_every_gold_number_in_ten_phrasings(gsm8k):
    """With the steps of a problem, full of other numbers, before it."""
    check_phrasings(list({gold(answer): answer for answer in gsm8k}.values()))


@pytest.mark.slow
def test_every_gold_answer_in_ten_phrasings(gsm8k):
    check_phrasings(gsm8k)


def test_the_number_is_compared_and_not_its_notation(gsm8k):
    """Every gold number with a digit more, a digit less, or another sign is another number."""
    for text in {gold(answer) for answer in gsm8k}:
        value = number(text)
        assert answers_match(text, f"${value:,.2f}") and answers_match(f"{value} eggs", text)
        assert answers_match(f"\\frac{{{2 * value}}}{{2}}", text)
        for wrong in (f"{value}0" if value else "10", f"{value + 1}", f"{value}.5", f"{value}.001", f"1{text}"):
            assert not answers_match(text, wrong), (text, wrong)
        assert answers_match(text, str(-value)) == (value == 0)


@pytest.mark.parametrize(
    "text, expected",
    [
        # What stands in the box counts, whatever else is said; the last one, with all its braces.
        ("\\boxed{7} no: \\boxed{\\dfrac{3}{4}}. The answer is 9.", "3/4"),
        ("$\\boxed{-\\frac{1}{2}}$", "-0.5"),
        ("\\boxed{\\text{18 dollars}}", "18"),
        ("\\boxed{2\\sqrt{\\frac{3}{5}}}", "2\\sqrt{3/5}"),
        ("\\boxed{(1,\\,-2)}", "(1, -2)"),
        ("\\boxed{x = 5}", "5"),
        ("\\boxed{90^\\circ}", "90"),
        ("\\boxed{12{,}345\\%}", "12345%"),
        # Numbers in any notation.
        ("The answer is 1 1/2 cups.", "1.5"),
        ("The answer is 2½ hours.", "2.5"),
        ("The answer is \u22125 degrees.", "-5"),
        ("The answer is negative 5.", "-5"),
        ("The answer is -$1,000.50.", "-1000.5"),
        ("#### $-1000.50", "-1000.5"),
        ("The answer is 2 \\times 10^3.", "2000"),
        ("That costs 2.5 million dollars.", "2500000"),
        ("She will have 3\u202f000 dollars.", "3000"),
        ("The answer is .5", "1/2"),
        # Units and trailing words.
        ("The area is 20 m^2.", "20"),
        ("The area is 20 cm².", "20"),
        ("She ran 5km.", "5"),
        ("The answer is $18/day.", "18"),
        ("The answer is 18 dollars for 5 eggs.", "18"),
        ("It is 50 percent.", "50"),
        # Where the answer stands.
        ("The answer is 5 + 3 = 8 apples.", "8"),
        ("The answer is 18 because 20 - 2 = 18.", "18"),
        ("The answer is that she makes $18 every day.", "18"),
        ("The answer is 18. Wait, the answer is 20.", "20"),
        ("The answer is 18. So my answer is correct.", "18"),
        ("The answer is not 5 but 6.", "6"),
        ("Answer: Janet has 16 eggs. She sells 9. So 9*2 = 18.", "18"),
        ("#### Step 1: add\n1 + 2 = 3\n#### Total\n3 + 4 = 7", "7"),
        ("She has **18 eggs** left after 2 days.", "18"),
        ("1. First 5 apples.\n2. Then 6 more.\nIn total 11 apples.", "11"),
        ("<think>The answer is 5.</think>It is 6.", "6"),
        # Not numbers.
        ("The answer is yes.", "yes"),
        ("The answer is (B).", "B"),
        ("The answer is Paris, of course.", "Paris, of course"),
        ("The answer is (1, 2).", "(1,2)"),
        ("The answer is $3\\sqrt{2}$.", "3\\sqrt{2}"),
        ("The answer is 2x + 3.", "2x+3"),
        ("The answer is 2 hours and 30 minutes.", "2 hours and 30 minutes"),
        ("The answer is 3 and a half.", "3 and a half"),
        ("The answer is 2 pi.", "2 pi"),
        ("The answer is 5 squared.", "5 squared"),
    ],
)
def test_what_people_and_models_write(text, expected):
    found = extract_answer(text)
    assert answers_match(found, expected), found


@pytest.mark.parametrize(
    "text",
    ["", "   ", "no idea", "I do not know the answer.", "The answer is", "\\boxed{}", "####", "It leaves at 3:30.",
     "H2O", "He came 3rd.", "from 10-12", "version 1.2.3", "9" * 6000, "<think>It is 5.</think>"],
)  # fmt: skip
def test_no_answer(text):
    assert extract_answer(text) is None


@pytest.mark.parametrize(
    "a, b",
    [
        ("18", "18.00"), ("1,000", "1000"), ("\\frac12", "0.5"), ("11/2", "5 1/2"), ("1e3", "1000"), ("+5", "5"),
        ("18 apples", "18"), ("5 m", "5"), ("18\\text{ cm}^2", "18"), ("$18$", "18"), ("-0", "0"), ("x=5", "5"),
        ("50%", "50"), ("50%", "0.5"), ("50\\%", "50 percent"), ("-7", "\u22127"), ("0.1", "1/10"),
        ("2 million", "2000000"),
        ("(1,2)", "(1, 2)"), ("A", "(a)"), ("New York", "new york."), ("\\frac{a}{b}", "\\dfrac{a}{b}"),
    ],
)  # fmt: skip
def test_same(a, b):
    assert answers_match(a, b) and answers_match(b, a)


@pytest.mark.parametrize(
    "a, b",
    [
        ("18", "81"), ("1/3", "0.33"), ("-5", "5"), ("50%", "5"), ("0.5%", "50%"), ("2 or 3", "2"), ("2x", "2"),
        ("3\\pi", "3"), ("1,2", "12"), ("1,23", "123"), ("2 million", "2"), ("3 and a half", "3"), ("10^2", "10"),
        ("2 hours 30 minutes", "2"), ("5²", "52"), ("5²", "5"), ("3:30", "3"), ("3-4", "3"), ("\\sqrt{5}", "5"),
        ("5i", "5"), ("2x=5", "5"), ("1/0", "0"), ("two", "2"), ("", ""), ("(1,234)", "1234"), ("5!", "5"),
        ("x^2", "x2"), ("A", "B"), ("9" * 400, "9" * 401), ("1e999", "1e998"), ("1e99999999", "1"),
        ("2 trillion", "2"), ("1 000", "1000"), ("2 hundred thousand", "200"), ("2 pi", "2"), ("5 squared", "5"),
        ("5 over 2", "5"),
    ],
)  # fmt: skip
def test_different(a, b):
    assert not answers_match(a, b) and not answers_match(b, a)


@pytest.mark.parametrize("size", [4, 6, 9])
def test_one_wrong_cell_of_a_grid_is_seen(size):
    """Grids are digits without end: compared as floats, they would be equal."""
    digits = "".join(map(str, range(1, size + 1)))
    grid = "".join(digits[row:] + digits[:row] for row in range(size))
    assert answers_match(grid, grid)
    for cell in range(size * size):
        wrong = f"{grid[:cell]}{int(grid[cell]) % size + 1}{grid[cell + 1 :]}"
        assert not answers_match(grid, wrong) and not answers_match(wrong, grid)
        assert not score_output("response", {"answer": grid}, grid, wrong).correct
    kept = scoring_kind(["prompt", "reasoning", "answer"], load_reasoning_dataset("sudoku", "test[:1]")[1])
    for text, right in ((grid, True), (f" {grid}\n", True), (f"0{grid}", False), (f"{grid}.0", False), ("", False)):
        assert score_output(kept, {"answer": grid}, grid, text).correct == right
    for short in (grid[:-1], f"{grid}1", f"{grid[0]}.{grid[1:]}e{size * size - 1}"):
        assert not score_output(kept, {"answer": grid}, grid, short).correct


@pytest.mark.parametrize(
    "a, b",
    [
        (r"2\sqrt{3}", r"2 \sqrt 3"), (r"\frac{\sqrt{2}}{2}", r"\sqrt{2}/2"), (r"\pi/2", r"\frac{\pi}{2}"),
        ("2*sqrt(3)", r"2\sqrt3"), ("2√3", r"\sqrt{12}"), ("2π", r"2\pi"), ("2x+3", "3+2x"), ("x**2", "x^2"),
        ("x^2+2x+1", "(x+1)^2"), (r"\frac12x", "x/2"), (r"\frac{1}{2}\pi", r"\pi/2"),
        (r"5\sqrt{2}\text{ cm}", r"5\sqrt2"),
        (r"\{1,2\}", r"\{2,1\}"), (r"[0,\infty)", r"\left[0, +\infty\right)"), ("(1/2, 3)", "(0.5,3)"),
        ("2 or 3", "3, 2"),
        (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty)\cup(-\infty,2)"), ("x<2", "2>x"), ("1 < x < 2", "(1,2)"),
        (r"x=1 \text{ or } x=2", "1,2"), ("y=2x+3", "y=3+2x"), ("10^2", "100"), (r"2\cdot 3", "6"), ("5!", "120"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        (r"2^{2020}\cdot2", "2^{2021}"), (r"\log_2 8", "3"),
    ],
)  # fmt: skip
def test_same_mathematics(a, b):
    assert answers_match(a, b) and answers_match(b, a)


@pytest.mark.parametrize(
    "a, b",
    [
        (r"2\sqrt{3}", r"3\sqrt{2}"), (r"\pi", "3.1415926"), ("(1,2)", "(2,1)"), ("[1,2]", "(1,2)"), ("x+1", "x-1"),
        (r"\{1,2\}", r"\{1,2,3\}"), ("10^{-7}", "10^{-8}"), ("10^{-7}", "0"), ("2**3", "23"), ("x**2", "x2"),
        # Letters that are no variables, and figures that are no products or fractions.
        ("two", "owt"), ("New York", "York New"), ("no", "on"), ("H2O", "HO2"),
        ("1 000", "0"), ("10/5/2020", "2/1/2020"),
    ],
)  # fmt: skip
def test_different_mathematics(a, b):
    assert not answers_match(a, b) and not answers_match(b, a)


HOSTILE = [
    "9**9**9", "9^{9^{9^9}}", "((9^9)^9)^9", "99999999!", "5!!!!", r"\begin{pmatrix}9^{9^9}\end{pmatrix}",
    "0.1^{-99999999}", r"\binom{1000000000}{500000000}", r"\sum_{i=1}^{10000000000} i", "(x+y+z+w)^{999}",
    "a^{b^{c^{d^{e}}}}",
    "(" * 90 + "x+1" + ")" * 90, "1+" * 5000 + "1", r"\frac{1}{" * 3000, r"\exp(\exp(\exp(\exp(9999))))",
    "(a+b+c+d+e)^{15}/(a-b-c-d-f)^{14}",
]  # fmt: skip


@pytest.mark.parametrize("in_main_thread", [True, False])
def test_hostile_answers_end_in_time(in_main_thread):
    """Signals, math-verify's own time limit, reach the main thread only."""
    found = {}

    def compare():
        for hostile in HOSTILE:
            start = time.monotonic()
            found[hostile] = answers_match(hostile, "5") or answers_match("5", hostile) or answers_match(hostile, "7x")
            assert time.monotonic() - start < 30, hostile

    thread = Thread(target=compare)
    thread.run() if in_main_thread else thread.start()
    if not in_main_thread:
        thread.join()
    assert found == dict.fromkeys(HOSTILE, False)
    assert answers_match("9**9**9", "9**9**9")


def test_plain_numbers_and_words_need_no_math_verify(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert answers_match("1,200", "$1200.00") and not answers_match("3", "three") and not answers_match("yes", "no")
    with pytest.raises(ImportError, match="train"):
        answers_match("2x+3", "3+2x")


def test_many_boxes_take_linear_time():
    start = time.monotonic()
    assert extract_answer("\\boxed{" * 20000) is None
    assert time.monotonic() - start < 20


def test_no_answer_matches_nothing():
    assert not answers_match(None, None) and not answers_match(None, "None") and not answers_match("0", None)
