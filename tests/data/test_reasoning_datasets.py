"""Every reasoning dataset in one schema, from local files and from a Hub; slices, streams, columns, bad rows."""

import gzip
import json
import os
import sys
from pathlib import Path

import pytest
from conftest import DATA, ROOT
from datasets import Dataset, IterableDataset
from hub_server import dataset_hub
from run_programs import run_program

from llada_trm_hf.data import difference_chains, load_reasoning_dataset
from llada_trm_hf.data.reasoning_sources import SOURCES, last_boxed
from llada_trm_hf.evaluation import run_tests
from llada_trm_hf.hidden_pairs.settings import load_problems

# A row of each dataset as it is published, written for this test, and what it must become.
PUBLISHED = {
    "gsm8k": (
        {"question": "Two and two?", "answer": "2+2 = <<2+2=4>>4\n#### 4"},
        {"prompt": "Two and two?", "reasoning": "2+2 = 4", "answer": "4"},
    ),
    "natural_reasoning": (
        {
            "question": "Why is the sky blue?",
            "reference_answer": "Rayleigh scattering",
            "responses": [{"response_model": "m", "response": "## Step 1: Light\nIt scatters."}],
        },
        {
            "prompt": "Why is the sky blue?",
            "reasoning": "## Step 1: Light\nIt scatters.",
            "answer": "Rayleigh scattering",
        },
    ),
    "math": (
        {
            "problem": "Half of three?",
            "level": "Level 1",
            "type": "Algebra",
            "solution": r"First \boxed{3}, then $\boxed{\frac{3}{2}}$.",
        },
        {
            "prompt": "Half of three?",
            "reasoning": r"First \boxed{3}, then $\boxed{\frac{3}{2}}$.",
            "answer": r"\frac{3}{2}",
        },
    ),
    "aime": (
        {"id": 60, "problem": "Find N.", "solution": r"So \boxed{025}.", "answer": "025", "url": "http"},
        {"prompt": "Find N.", "reasoning": r"So \boxed{025}.", "answer": "25"},
    ),
    "humaneval": (
        {
            "task_id": "HumanEval/0",
            "prompt": 'def double(x: int) -> int:\n    """Twice x."""\n',
            "canonical_solution": "    return 2 * x\n",
            "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate(3) == 6\n",
            "entry_point": "double",
        },
        {
            "prompt": 'def double(x: int) -> int:\n    """Twice x."""\n',
            "reasoning": "",
            "answer": 'def double(x: int) -> int:\n    """Twice x."""\n    return 2 * x\n',
            "tests": "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate(3) == 6\n\ncheck(double)\n",
            "entry_point": "double",
        },
    ),
    "mbpp": (
        {
            "task_id": 1,
            "text": "Write a function to double.",
            "code": "import math\r\ndef half(x):\r\n  return x / 2\r\ndef twice(x):\r\n  return 2 * x",
            "test_list": ["assert set([twice(3)]) == set([6])", "assert twice(1) == 2"],
            "test_setup_code": "",
            "challenge_test_list": [],
        },
        {
            "prompt": "Write a function to double.\nYour code should pass these tests:\n"
            "assert set([twice(3)]) == set([6])\nassert twice(1) == 2",
            "reasoning": "",
            "answer": "import math\ndef half(x):\n  return x / 2\ndef twice(x):\n  return 2 * x",
            "tests": "assert set([twice(3)]) == set([6])\nassert twice(1) == 2\n",
            "entry_point": "twice",
        },
    ),
    "apps": (
        {
            "problem_id": 0,
            "question": "Print the number.",
            "solutions": json.dumps(["print(input())\r\n", "import sys"]),
            "input_output": "",
            "difficulty": "interview",
            "url": "http",
            "starter_code": "",
        },
        {
            "prompt": "Print the number.\n\nWrite a Python program that reads standard input and prints.",
            "reasoning": "",
            "answer": "print(input())",
            "tests": "",
            "entry_point": "",
        },
    ),
}


def write_lines(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def apps_row(cases: dict | None, solution: str = "pass", starter: str = "") -> dict:
    row = {**PUBLISHED["apps"][0], "solutions": json.dumps([solution]), "starter_code": starter}
    return {**row, "input_output": "" if cases is None else json.dumps(cases)}


def passes(programs: list[str]) -> list[bool]:
    """Whether each program ends without an error, all in one limited process."""
    harness = (
        "import io, json, resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (60, 60))\n"
        "programs, results, out = json.load(sys.stdin), [], sys.stdout\n"
        "for program in programs:\n"
        "    sys.stdin, sys.stdout = io.StringIO(), io.StringIO()\n"
        "    try:\n"
        "        exec(program, {'__name__': 'checked'})\n"
        "        results.append(True)\n"
        "    except Exception:\n"
        "        results.append(False)\n"
        "print(json.dumps(results), file=out)\n"
    )
    command = [sys.executable, "-c", harness]
    result = run_program(command, input=json.dumps(programs))
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


# --- One schema ---


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("streaming", [False, True])
def test_published_rows_become_the_schema(tmp_path, name, streaming):
    row, expected = PUBLISHED[name]
    path = write_lines(tmp_path / "rows.jsonl", [row, row])
    rows, response = load_reasoning_dataset(name, data_files=path, streaming=streaming)
    assert isinstance(rows, IterableDataset if streaming else Dataset)
    assert list(rows) == [expected, expected] and set(rows.column_names) == set(expected)
    written = response.format(**expected).strip()
    is_code = SOURCES[name].is_code
    text = expected["answer"] if is_code else f"{expected['reasoning']}\n#### {expected['answer']}"
    assert written == text.strip()


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "aime"])
def test_a_file_is_recognised_by_its_columns(tmp_path, name):
    row, expected = PUBLISHED[name]
    rows, response = load_reasoning_dataset(write_lines(tmp_path / "rows.jsonl", [row]))
    assert rows[0] == expected and response == SOURCES[name].response


def test_which_answers_are_programs():
    assert {name for name, source in SOURCES.items() if source.is_code} == {"humaneval", "mbpp", "apps"}


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"so $\boxed{\frac{1}{\sqrt{2}}}$.", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{1} or \boxed{ 2 }", "2"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x }, then", r"\left\{ x"),
        (r"\boxed{a\\}", r"a\\"),
        (r"it is $\boxed 7$", "7"),
        (r"\fbox{3} units", "3"),
        (r"\boxed{4} and \boxedsize{5}", "4"),
        (r"\boxed{6} and an open \boxed{{7}", "6"),
        (r"\boxed{{7}", None),
        ("no box", None),
    ],
)
def test_the_last_box(text, answer):
    assert last_boxed(text) == answer


def test_rows_without_an_answer_are_left_out_and_counted(tmp_path, capsys):
    row, expected = PUBLISHED["natural_reasoning"]
    path = write_lines(tmp_path / "rows.jsonl", [{**row, "reference_answer": text} for text in ("", "x", None, " ")])
    rows, _ = load_reasoning_dataset("natural_reasoning", data_files=path)
    assert list(rows) == [{**expected, "answer": "x"}]
    assert "Left out 3 of 4 rows" in capsys.readouterr().out
    streamed, _ = load_reasoning_dataset("natural_reasoning", data_files=path, streaming=True)
    assert list(streamed) == list(rows)
    write_lines(tmp_path / "rows.jsonl", [{**row, "reference_answer": ""}] * 3)
    with pytest.raises(ValueError, match="none of its rows has an answer"):
        load_reasoning_dataset("natural_reasoning", data_files=path)


def test_a_problem_of_apps_without_solution_or_without_tests_stays(tmp_path):
    tested = apps_row({"inputs": ["1\n"], "outputs": ["1\n"]})
    rows = [{**tested, "solutions": ""}, apps_row(None), {**apps_row(None), "solutions": "[]"}]
    loaded = list(load_reasoning_dataset("apps", data_files=write_lines(tmp_path / "rows.jsonl", rows))[0])
    assert [(bool(row["answer"]), bool(row["tests"])) for row in loaded] == [(False, True), (True, False)]


# --- Programs and their tests ---


@pytest.mark.parametrize("name, file", [("humaneval", "humaneval/HumanEval.jsonl.gz"), ("mbpp", "mbpp/mbpp.jsonl")])
def test_real_reference_programs_pass_their_tests_and_others_do_not(name, file):
    if not (DATA / file).exists():
        pytest.skip(f"no {name} file")
    rows, _ = load_reasoning_dataset(name, "train[:100]", data_files=str(DATA / file))
    programs = [f"{row['answer']}\n\n{row['tests']}" for row in rows]
    wrong = [f"def {row['entry_point']}(*_): return object()\n\n{row['tests']}" for row in rows]
    assert passes(programs + wrong) == [True] * 100 + [False] * 100
    assert name == "humaneval" or all(row["tests"] in row["prompt"] + "\n" for row in rows)


def test_what_humaneval_judges_by_is_not_the_solution_s(tmp_path):
    """A function that the prompt defines, which a solution defines again to suit itself."""
    prompt = "def code(s):\n    return s[::-1]\n\ndef decode(s):\n"
    test = "def check(candidate):\n    assert candidate(code('ab')) == 'ab'\n"
    row = {"task_id": "1", "prompt": prompt, "canonical_solution": "    return s[::-1]\n", "test": test}
    path = write_lines(tmp_path / "rows.jsonl", [{**row, "entry_point": "decode"}])
    (loaded,) = load_reasoning_dataset("humaneval", data_files=path)[0]
    forged = f"{prompt}    return s\ndef code(s): return s\n"
    found = [run_tests(program, loaded["tests"], "decode").passed for program in (loaded["answer"], forged)]
    assert found == [True, False]


STDIN = {"inputs": ["2\n3 4\n", ["2", "5 6"]], "outputs": ["7\n", ["11"]]}
CALLS = {"fn_name": "pair", "inputs": [[[1, 2]], [[3, 4]]], "outputs": [[1, 2], [[3, 4]]]}
LONG = {"inputs": ["0\n"], "outputs": ["1" * 5000 + "\n"]}


@pytest.mark.parametrize(
    "cases, solution, right",
    [
        (STDIN, "input()\nprint(sum(map(int, input().split())))", True),
        (STDIN, "import sys\nn, *x = map(int, sys.stdin.buffer.read().split())\nprint(float(sum(x)))", True),
        (STDIN, "def main():\n    input(); print(sum(map(int, input().split()))); exit()\nmain()", True),
        (
            STDIN,
            "import threading, time\ndef run():\n    time.sleep(0.05); input(); print(sum(map(int, input().split())))"
            "\nthreading.Thread(target=run).start()",
            True,
        ),
        (STDIN, "import sys\ninput(); sys.stdout.buffer.write(b'%d' % sum(map(int, input().split())))", True),
        (STDIN, "if __name__ == '__main__':\n    input(); print(sum(map(int, input().split())))", True),
        (STDIN, "print(7)", False),
        (STDIN, "input(); print(sum(map(int, input().split())), 1)", False),
        (STDIN, "pass", False),
        (STDIN, "input(); input(); input()", False),
        (LONG, "print('1' * 5000)", True),
        (LONG, "print('1' * 4999 + '2')", False),
        (CALLS, "def pair(x): return tuple(x)", True),
        (CALLS, "class Solution:\n    def pair(self, x: List[int]) -> List[int]:\n        return list(x)", True),
        (CALLS, "def pair(x): return x\nif __name__ == '__main__': input()", True),
        (CALLS, "def pair(x): return x[::-1]", False),
        (CALLS, "def other(x): return x", False),
    ],
)
def test_tests_of_apps(tmp_path, cases, solution, right):
    path = write_lines(tmp_path / "rows.jsonl", [apps_row(cases, solution)])
    (row,) = load_reasoning_dataset("apps", data_files=path)[0]
    assert row["entry_point"] == cases.get("fn_name", "")
    assert run_tests(row["answer"], row["tests"], row["entry_point"]).passed == right


def test_numbers_too_long_for_python_are_read(tmp_path):
    text = '{"fn_name": "f", "inputs": [[1]], "outputs": [' + "9" * 5000 + "]}"
    row = {**apps_row(None, "def f(x): return 10**5000 - 1"), "input_output": text}
    (loaded,) = load_reasoning_dataset("apps", data_files=write_lines(tmp_path / "rows.jsonl", [row]))[0]
    assert run_tests(loaded["answer"], loaded["tests"]).passed
    assert not run_tests("def f(x): return 10**5000", loaded["tests"]).passed


# --- Slices and streams ---


@pytest.fixture
def numbered(tmp_path) -> str:
    return write_lines(tmp_path / "numbered.jsonl", [{"prompt": f"{i}?", "answer": str(i)} for i in range(250)])


def answers(rows) -> list[int]:
    return [int(row["answer"]) for row in rows]


@pytest.mark.parametrize(
    "split, part",
    [
        ("train", slice(None)),
        ("train[:7]", slice(7)),
        ("test[240:]", slice(240, None)),
        ("train[120:130]", slice(120, 130)),
        ("train[:9999]", slice(None)),
        ("test[10%:20%]", slice(25, 50)),
        ("train[-3:]", slice(-3, None)),
    ],
)
def test_slices(numbered, split, part):
    assert answers(load_reasoning_dataset(numbered, split)[0]) == list(range(250))[part]
    if "%" in split or "-" in split:
        with pytest.raises(ValueError, match=r"A stream is sliced by numbers from its start.*got \w+\["):
            load_reasoning_dataset(numbered, split, streaming=True)
    else:
        rows, _ = load_reasoning_dataset(numbered, split, streaming=True)
        assert answers(rows) == list(range(250))[part]
        assert answers(rows) == list(range(250))[part]  # a second epoch


@pytest.mark.parametrize("split", ["train[:10", "train[10%:20]", "train[a:b]", "train+test", "", "train[5]"])
@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_no_slice(numbered, split, streaming):
    with pytest.raises(ValueError, match=r"A split is a name such as .*; got '"):
        load_reasoning_dataset(numbered, split, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("split", ["train[5:5]", "train[250:]"])
def test_an_empty_slice(numbered, split, streaming):
    with pytest.raises(ValueError, match=r"is empty|corresponds to no data"):
        load_reasoning_dataset(numbered, split, streaming=streaming)


@pytest.mark.parametrize(
    "name, wrong, exist",
    [
        ("humaneval", "train", "test"),
        ("aime", "test", "train"),
        ("natural_reasoning", "test[:10]", "train"),
        ("mbpp", "dev", "train, test, validation, prompt"),
        ("gsm8k", "validation", "train, test"),
        ("arithmetic", "validation", "train, test"),
    ],
)
def test_a_wrong_split_names_those_that_exist(name, wrong, exist):
    with pytest.raises(ValueError, match=rf"{name} has no split '\w+', it has {exist}\.$"):
        load_reasoning_dataset(name, wrong)


def test_arithmetic_is_sliced_and_streamed():
    everything = list(difference_chains(30, 5, "test", seed=3))
    for split, part in (("test[:30]", slice(None)), ("test[10:20]", slice(10, 20))):
        for streaming in (False, True):
            rows, _ = load_reasoning_dataset("arithmetic", split, num_terms=5, seed=3, streaming=streaming)
            assert list(rows) == everything[part]
    with pytest.raises(ValueError, match="arithmetic is sliced by numbers"):
        load_reasoning_dataset("arithmetic", "train[:10%]")


def test_problems_of_several_datasets(tmp_path):
    names = ("gsm8k", "mbpp", "natural_reasoning")
    files = [write_lines(tmp_path / f"{name}.jsonl", [PUBLISHED[name][0]] * 3) for name in names]
    problems = load_problems([*files, "arithmetic"], "train[:2]", columns=None, num_terms=4)
    assert problems["id"][:3] == ["gsm8k.jsonl:train[:2]:0", "gsm8k.jsonl:train[:2]:1", "mbpp.jsonl:train[:2]:0"]
    assert problems["prompt"][:6:2] == [PUBLISHED[name][1]["prompt"] for name in names] and len(problems) == 8


# --- Files, columns, bad rows ---


def test_files_of_every_format(tmp_path):
    rows = [{"q": "1+1?", "why": "NA", "a": 2}, {"q": 'say "x,\ny"', "why": "", "a": 3}]
    paths = [tmp_path / name for name in ("x.csv", "x.parquet", "x.json", "x.jsonl", "x.jsonl.gz")]
    Dataset.from_list(rows).to_csv(paths[0])
    Dataset.from_list(rows).to_parquet(paths[1])
    paths[2].write_text(json.dumps(rows))
    lines = Path(write_lines(paths[3], rows)).read_bytes()
    paths[4].write_bytes(gzip.compress(lines))
    columns = {"prompt": "q", "reasoning": "why", "answer": "a"}
    expected = [{"prompt": row["q"], "reasoning": row["why"], "answer": str(row["a"])} for row in rows]
    for path in paths:
        for streaming in (False, True):
            loaded, _ = load_reasoning_dataset(str(path), columns=columns, streaming=streaming)
            assert list(loaded) == expected


def test_columns_name_what_is_meant_even_if_others_have_the_name(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [{"prompt": "unused", "q": "1+1?", "answer": "2", "note": 1}])
    assert load_reasoning_dataset(path, columns={"prompt": "q"})[0][0]["prompt"] == "1+1?"
    swapped = load_reasoning_dataset(path, columns={"prompt": "answer", "answer": "prompt"})[0][0]
    assert swapped["prompt"] == "2" and swapped["answer"] == "unused"
    row = {"question": "?", "solution": "so #### 4"}
    path = write_lines(tmp_path / "y.jsonl", [row])
    named, _ = load_reasoning_dataset("gsm8k", data_files=path, columns={"answer": "solution"})
    assert named[0] == {"prompt": "?", "reasoning": "so", "answer": "4"}


def test_a_local_file_of_programs(tmp_path):
    row = {"prompt": "Double.", "answer": "def f(x): return 2 * x", "tests": "assert f(2) == 4"}
    rows, response = load_reasoning_dataset(write_lines(tmp_path / "x.jsonl", [row]))
    assert rows[0] == {**row, "reasoning": "", "entry_point": ""} and response.endswith("\n{answer}")
    right, wrong = (f"{code}\n{rows[0]['tests']}" for code in (row["answer"], "def f(x): return x"))
    assert passes([right, wrong]) == [True, False]


def test_a_column_that_does_not_exist_or_is_not_known(numbered):
    with pytest.raises(ValueError, match=r"no such column: prompt=q. It has prompt, answer"):
        load_reasoning_dataset(numbered, columns={"prompt": "q"})
    with pytest.raises(ValueError, match=r"columns name prompt, answer, .*; got promt"):
        load_reasoning_dataset(numbered, columns={"promt": "prompt"})
    with pytest.raises(ValueError, match=r"lacks the columns problem, solution; it has prompt, answer"):
        load_reasoning_dataset("math", data_files=numbered)


BAD_ROWS = [
    ("gsm8k", {"answer": "four"}, "ends with '#### result'"),
    ("gsm8k", {"question": None}, "question must be text, got None"),
    ("math", {"solution": "four"}, r"its answer in \\boxed"),
    ("aime", {"answer": "1000"}, "whole number from 0 to 999; got '1000'"),
    ("humaneval", {"test": None}, "test must be text"),
    ("mbpp", {"test_list": []}, "test_list must be a list of asserts"),
    ("mbpp", {"test_list": ["assert other(1)"]}, "call no function of its code"),
    ("mbpp", {"code": "def twice(x)"}, "not Python"),
    ("apps", {"solutions": "[1"}, "solutions is not valid JSON"),
    ("apps", {"solutions": "{}"}, "JSON list of programs"),
    ("apps", {"input_output": "{"}, "input_output is not valid JSON"),
    ("apps", {"input_output": '{"inputs": 1}'}, "the lists inputs and outputs"),
]


@pytest.mark.parametrize("name, change, message", BAD_ROWS)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_malformed_row_is_named(tmp_path, name, change, message, streaming):
    good = PUBLISHED[name][0]
    path = write_lines(tmp_path / "rows.jsonl", [good] * 150 + [{**good, **change}, good])
    with pytest.raises(ValueError, match=rf"rows.jsonl \[train\[20:\]\], row 130: .*{message}"):
        list(load_reasoning_dataset(name, "train[20:]", data_files=path, streaming=streaming)[0])
    assert len(list(load_reasoning_dataset(name, "train[:150]", data_files=path, streaming=streaming)[0])) == 150


@pytest.mark.parametrize("streaming", [False, True])
def test_a_malformed_file_is_named(tmp_path, streaming):
    for name, text in (("x.jsonl", '{"prompt": "a", "answer"\n'), ("x.parquet", "PAR2"), ("y.jsonl", "\xff\n")):
        (tmp_path / name).write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=f"{name} is not valid"):
            load_reasoning_dataset(str(tmp_path / name), streaming=streaming)


# --- The Hub ---

READ_HUB = """
import json, sys
from llada_trm_hf.data import load_reasoning_dataset
for name, split, streaming in json.loads(sys.argv[1]):
    try:
        rows = list(load_reasoning_dataset(name, split, streaming=streaming)[0])
    except ValueError as error:
        rows = str(error)
    print("RESULT", json.dumps(rows))
"""


def card(config: str, *splits: str) -> bytes:
    """The head of a dataset card, where the Hub's own names of files are."""
    files = "".join(f"  - split: {split}\n    path: {config}/{split}-*\n" for split in splits)
    return f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{files}---\n".encode()


def read_from_hub(url: str, home: Path, *wanted) -> list:
    away = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    result = run_program(
        [sys.executable, "-c", READ_HUB, json.dumps(wanted)],
        env={**os.environ, **away, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line.split(" ", 1)[1]) for line in result.stdout.splitlines() if line.startswith("RESULT")]


def test_every_dataset_is_read_from_its_repository(tmp_path):
    layouts = {
        "openai/gsm8k": ("gsm8k", "main", ("train", "test")),
        "facebook/natural_reasoning": ("natural_reasoning", "default", ("train",)),
        "DigitalLearningGmbH/MATH-lighteval": ("math", "default", ("train", "test")),
        "AI-MO/aimo-validation-aime": ("aime", "default", ("train",)),
        "openai/openai_humaneval": ("humaneval", "openai_humaneval", ("test",)),
        "google-research-datasets/mbpp": ("mbpp", "full", ("train", "test", "validation", "prompt")),
    }
    repositories = {}
    for repository, (name, config, splits) in layouts.items():
        line = json.dumps(PUBLISHED[name][0]).encode() + b"\n"
        files = {f"{config}/{split}-0.jsonl": line * (4 + i) for i, split in enumerate(splits)}
        repositories[repository] = {"README.md": card(config, *splits), **files}
    # Its test file is 120 megabytes, its script must not be run.
    row = apps_row({"inputs": ["1 " * 50_000], "outputs": ["1"]})
    repositories["codeparrot/apps"] = {
        "README.md": b"",
        "apps.py": b"raise SystemExit",
        "train.jsonl": json.dumps(PUBLISHED["apps"][0]).encode() + b"\n",
        "test.jsonl": (json.dumps(row).encode() + b"\n") * 1200,
    }
    wanted = [(name, splits[-1], False) for name, _, splits in layouts.values()]
    wanted += [("gsm8k", "test[1:3]", True), ("apps", "train", False), ("apps", "test[2:5]", True)]
    with dataset_hub(repositories) as hub:
        found = read_from_hub(hub.url, tmp_path, *wanted)
        assert hub.sent["test.jsonl"] < len(repositories["codeparrot/apps"]["test.jsonl"]) / 2
    for (name, _, splits), rows in zip(layouts.values(), found):
        assert rows == [PUBLISHED[name][1]] * (3 + len(splits)), name
    streamed, apps, apps_tested = found[-3:]
    assert streamed == [PUBLISHED["gsm8k"][1]] * 2 and apps == [PUBLISHED["apps"][1]]
    assert len(apps_tested) == 3 and all("SOLUTION" in row["tests"] for row in apps_tested)


def test_a_repository_that_is_not_there(tmp_path):
    with dataset_hub({}) as hub:
        (error,) = read_from_hub(hub.url, tmp_path, ("math", "train", False))
    assert error.startswith("DigitalLearningGmbH/MATH-lighteval cannot be fetched from the Hub (DatasetNotFoundError)")


@pytest.mark.parametrize("name", ["gsm8k", "apps"])
def test_without_a_connection(name):
    # HF_HUB_OFFLINE is set in all tests.
    with pytest.raises(ValueError, match=r"cannot be fetched from the Hub .*Offline, name a local copy"):
        load_reasoning_dataset(name)
