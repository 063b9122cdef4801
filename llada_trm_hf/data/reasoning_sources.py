"""The reasoning datasets, and how their rows become `prompt`, `reasoning`, `answer` and, for code, `tests`."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .code_tests import apps_tests, called_function

SCHEMA = ("prompt", "reasoning", "answer")
CODE_COLUMNS = ("tests", "entry_point")


@dataclass(frozen=True)
class ReasoningSource:
    """
    Where a dataset comes from and how its rows become problems.

    Attributes:
        columns: the columns its rows have and `convert` reads.
        convert: row -> the texts of the schema, and of `CODE_COLUMNS` for code; an answer or tests that a problem
            lacks are empty. Raises ValueError for a malformed row.
        hub_name, hub_config: on the Hugging Face Hub; None for generated data and local files.
        splits: those that exist.
        response: how reasoning and answer are written, a format string.
        is_code: whether answers are programs, which tests check.
        hub_files: the file of each split, where the repository has no other form.
    """

    columns: tuple[str, ...]
    convert: Callable[[dict[str, Any]], dict[str, str]]
    hub_name: str | None = None
    hub_config: str | None = None
    splits: tuple[str, ...] = ("train", "test")
    response: str = "{reasoning}\n#### {answer}"
    is_code: bool = False
    hub_files: dict[str, str] | None = None

    @property
    def result_columns(self) -> tuple[str, ...]:
        """The columns that `convert` gives."""
        return SCHEMA + CODE_COLUMNS if self.is_code else SCHEMA


def last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` or `\boxed ...` of a text holds, nested braces included; None if there is none."""
    closing: dict[int, int] = {}  # where the brace that is opened at a position is closed
    opened = []
    # An escaped brace is a sign in the formula, not one that groups.
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            closing[opened.pop()] = match.start()
    for match in reversed(list(re.finditer(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*(\{|[^\s${][^\s$]*)", text))):
        if match[1] != "{":
            return match[1]
        if match.start(1) in closing:
            return text[match.end() : closing[match.start(1)]].strip()
    return None


def _text(row: dict[str, Any], column: str) -> str:
    """A text, or a number as text, as csv and json files give it."""
    value = row[column]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{column} must be text, got {value!r:.80}.")
    return str(value)


def _optional(row: dict[str, Any], column: str) -> str:
    return "" if row.get(column) is None else _text(row, column)


def _convert_local(row: dict[str, Any]) -> dict[str, str]:
    """A row that has the schema already; all but the prompt may be missing or null."""
    return {"prompt": _text(row, "prompt")} | {name: _optional(row, name) for name in (*SCHEMA[1:], *CODE_COLUMNS)}


def _problem(prompt: str, reasoning: str, answer: str) -> dict[str, str]:
    return {"prompt": prompt.strip(), "reasoning": reasoning.strip(), "answer": answer.strip()}


def _convert_gsm8k(row: dict[str, Any]) -> dict[str, str]:
    """`answer` holds the steps, with calculator notes like <<48/2=24>>, and the result after `####`."""
    steps, separator, result = _text(row, "answer").rpartition("####")
    if not separator:
        raise ValueError(f"A GSM8K answer ends with '#### result'; got {row['answer'][-80:]!r}.")
    return _problem(_text(row, "question"), re.sub(r"<<.*?>>", "", steps), result)


def _convert_natural_reasoning(row: dict[str, Any]) -> dict[str, str]:
    """`responses` holds what a model answered, `reference_answer` may be empty (18% of the rows)."""
    responses = row["responses"] or [{"response": ""}]
    return _problem(_text(row, "question"), _optional(responses[0], "response"), _optional(row, "reference_answer"))


def _convert_math(row: dict[str, Any]) -> dict[str, str]:
    r"""The answer is in the last `\boxed{}` of the solution."""
    solution = _text(row, "solution").strip()
    answer = last_boxed(solution)
    if answer is None:
        raise ValueError(f"A solution of MATH holds its answer in \\boxed{{}}; got {solution[-80:]!r}.")
    return _problem(_text(row, "problem"), solution, answer)


def _convert_aime(row: dict[str, Any]) -> dict[str, str]:
    """Answers are whole numbers from 000 to 999; some are written with their leading zeros."""
    answer = _text(row, "answer").strip()
    if not re.fullmatch(r"\d{1,3}", answer):
        raise ValueError(f"An answer of AIME is a whole number from 0 to 999; got {answer!r}.")
    return _problem(_text(row, "problem"), _text(row, "solution"), str(int(answer)))


def _convert_humaneval(row: dict[str, Any]) -> dict[str, str]:
    """
    `prompt` is the head of a function, `canonical_solution` its body; `test` defines `check(candidate)`. Where the
    prompt defines functions before (`poly`, `encode_shift`), by which some tests judge, the tests have their own.
    """
    name, prompt = _text(row, "entry_point"), _text(row, "prompt")
    helpers = prompt.partition(f"def {name}(")[0].strip()
    helpers = f"{helpers}\n\n" if "def " in helpers else ""
    return {
        "prompt": prompt,
        "reasoning": "",
        "answer": prompt + _text(row, "canonical_solution"),
        "tests": f"{helpers}{_text(row, 'test').strip()}\n\ncheck({name})\n",
        "entry_point": name,
    }


def _convert_mbpp(row: dict[str, Any]) -> dict[str, str]:
    """The prompt shows the tests, as in the paper (arXiv 2108.07732): only they say what the function is called."""
    tests, code = row["test_list"], _text(row, "code").replace("\r\n", "\n").strip()
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        raise ValueError(f"test_list must be a list of asserts, got {tests!r:.80}.")
    asserts = "\n".join(tests)
    return {
        "prompt": f"{_text(row, 'text').strip()}\nYour code should pass these tests:\n{asserts}",
        "reasoning": "",
        "answer": code,
        "tests": f"{_optional(row, 'test_setup_code')}\n{asserts}\n".lstrip(),
        "entry_point": called_function(code, tests),
    }


def _convert_apps(row: dict[str, Any]) -> dict[str, str]:
    """`solutions` and `input_output` are JSON texts, or empty; of several solutions the first is the answer."""
    try:
        solutions = json.loads(_optional(row, "solutions").strip() or "[]")
    except json.JSONDecodeError as error:
        raise ValueError(f"solutions is not valid JSON: {error}") from error
    if not isinstance(solutions, list) or not all(isinstance(solution, str) for solution in solutions):
        raise ValueError(f"solutions must be a JSON list of programs, got {row['solutions'][:80]!r}.")
    tests, name = apps_tests(_optional(row, "input_output"))
    starter = _optional(row, "starter_code").strip()
    task = f"Write {name} in Python." if name else "Write a Python program that reads standard input and prints."
    return {
        "prompt": "\n\n".join(part for part in (_text(row, "question").strip(), starter, task) if part),
        "reasoning": "",
        "answer": solutions[0].replace("\r\n", "\n").strip() if solutions else "",
        "tests": tests,
        "entry_point": name,
    }


# Repositories, columns and splits are those of the dataset cards on the Hub. A local file is of the first of these
# whose columns it has: files of problem, solution and answer are read as math.
SOURCES = {
    "arithmetic": ReasoningSource(SCHEMA, _convert_local, response="{reasoning}{answer}"),
    "prefix_sum": ReasoningSource(SCHEMA, _convert_local, response="{answer}"),
    "sudoku": ReasoningSource(SCHEMA, _convert_local, response="{answer}"),
    "maze": ReasoningSource(SCHEMA, _convert_local, response="{answer}"),
    "gsm8k": ReasoningSource(("question", "answer"), _convert_gsm8k, "openai/gsm8k", "main"),
    "natural_reasoning": ReasoningSource(
        ("question", "reference_answer", "responses"),
        _convert_natural_reasoning,
        "facebook/natural_reasoning",
        splits=("train",),
    ),
    # MATH (arXiv 2103.03874) with the original 7,500 and 5,000 problems in one configuration.
    "math": ReasoningSource(("problem", "solution"), _convert_math, "DigitalLearningGmbH/MATH-lighteval", "default"),
    "aime": ReasoningSource(  # the 90 problems of 2022 to 2024
        ("problem", "solution", "answer"), _convert_aime, "AI-MO/aimo-validation-aime", splits=("train",)
    ),
    "humaneval": ReasoningSource(
        ("prompt", "canonical_solution", "test", "entry_point"),
        _convert_humaneval,
        "openai/openai_humaneval",
        splits=("test",),
        response="{answer}",
        is_code=True,
    ),
    "mbpp": ReasoningSource(
        ("text", "code", "test_list", "test_setup_code"),
        _convert_mbpp,
        "google-research-datasets/mbpp",
        "full",
        splits=("train", "test", "validation", "prompt"),
        response="{answer}",
        is_code=True,
    ),
    "apps": ReasoningSource(  # its repository has a loading script beside the files
        ("question", "solutions", "input_output", "starter_code"),
        _convert_apps,
        "codeparrot/apps",
        response="{answer}",
        is_code=True,
        hub_files={split: f"hf://datasets/codeparrot/apps/{split}.jsonl" for split in ("train", "test")},
    ),
}
LOCAL_FILE = ReasoningSource(("prompt", "answer"), _convert_local)
LOCAL_CODE = ReasoningSource(
    ("prompt", "answer", "tests"), _convert_local, response="{reasoning}\n{answer}", is_code=True
)
