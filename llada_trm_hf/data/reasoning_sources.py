"""
The reasoning datasets and how their rows become one schema: `prompt`, `reasoning`, `answer`, and for code `tests` and
`entry_point`.

Repositories, columns and splits are those of the dataset cards on the Hub. `apps` is read from the files of its
repository, which has a loading script. `math` is the copy of MATH (arXiv 2103.03874) with the original split of 7,500
and 5,000 problems in one configuration; other copies have the same columns `problem` and `solution`. `aime` holds the
90 problems of 2022 to 2024.
"""

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
        convert: row -> `{"prompt", "reasoning", "answer"}`, all texts, and for code `"tests"` and `"entry_point"` (see
            `code_tests`); an answer or tests that a problem lacks are empty. Raises ValueError for a malformed row.
        is_code: whether answers are programs, which tests check; `evaluation` compares all others by what they hold.
        response: how reasoning and answer are written, a format string.
        hub_name, hub_config: on the Hugging Face Hub; None for generated data and local files.
        hub_files: the file of each split, where the repository has no other form.
        splits: those that exist.
    """

    columns: tuple[str, ...]
    convert: Callable[[dict[str, Any]], dict[str, str]]
    is_code: bool = False
    response: str = "{reasoning}\n#### {answer}"
    hub_name: str | None = None
    hub_config: str | None = None
    hub_files: dict[str, str] | None = None
    splits: tuple[str, ...] = ("train", "test")

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


def _convert_gsm8k(row: dict[str, Any]) -> dict[str, str]:
    """`answer` holds the steps, with calculator notes like <<48/2=24>>, and the result after `####`."""
    steps, separator, result = _text(row, "answer").rpartition("####")
    if not separator:
        raise ValueError(f"A GSM8K answer ends with '#### result'; got {row['answer'][-80:]!r}.")
    return {
        "prompt": _text(row, "question").strip(),
        "reasoning": re.sub(r"<<.*?>>", "", steps).strip(),
        "answer": result.strip(),
    }


def _convert_natural_reasoning(row: dict[str, Any]) -> dict[str, str]:
    """`responses` holds what a model answered, `reference_answer` may be empty (18% of the rows)."""
    responses = row["responses"] or [{"response": ""}]
    return {
        "prompt": _text(row, "question").strip(),
        "reasoning": _optional(responses[0], "response").strip(),
        "answer": _optional(row, "reference_answer").strip(),
    }


def _convert_math(row: dict[str, Any]) -> dict[str, str]:
    r"""The answer is in the last `\boxed{}` of the solution."""
    solution = _text(row, "solution").strip()
    answer = last_boxed(solution)
    if answer is None:
        raise ValueError(f"A solution of MATH holds its answer in \\boxed{{}}; got {solution[-80:]!r}.")
    return {"prompt": _text(row, "problem").strip(), "reasoning": solution, "answer": answer}


def _convert_aime(row: dict[str, Any]) -> dict[str, str]:
    """Answers are whole numbers from 000 to 999; some are written with their leading zeros."""
    answer = _text(row, "answer").strip()
    if not re.fullmatch(r"\d{1,3}", answer):
        raise ValueError(f"An answer of AIME is a whole number from 0 to 999; got {answer!r}.")
    return {
        "prompt": _text(row, "problem").strip(),
        "reasoning": _text(row, "solution").strip(),
        "answer": str(int(answer)),
    }


def _convert_humaneval(row: dict[str, Any]) -> dict[str, str]:
    """`prompt` is the head of a function, `canonical_solution` its body; `test` defines `check(candidate)`."""
    name = _text(row, "entry_point")
    return {
        "prompt": _text(row, "prompt"),
        "reasoning": "",
        "answer": _text(row, "prompt") + _text(row, "canonical_solution"),
        "tests": f"{_text(row, 'test').strip()}\n\ncheck({name})\n",
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


# A local file is of the first of these whose columns it has: files of problem, solution and answer are read as math.
SOURCES = {
    "arithmetic": ReasoningSource(SCHEMA, _convert_local, response="{reasoning}{answer}"),
    "gsm8k": ReasoningSource(("question", "answer"), _convert_gsm8k, hub_name="openai/gsm8k", hub_config="main"),
    "natural_reasoning": ReasoningSource(
        ("question", "reference_answer", "responses"),
        _convert_natural_reasoning,
        hub_name="facebook/natural_reasoning",
        splits=("train",),
    ),
    "math": ReasoningSource(
        ("problem", "solution"),
        _convert_math,
        hub_name="DigitalLearningGmbH/MATH-lighteval",
        hub_config="default",
    ),
    "aime": ReasoningSource(
        ("problem", "solution", "answer"),
        _convert_aime,
        hub_name="AI-MO/aimo-validation-aime",
        splits=("train",),
    ),
    "humaneval": ReasoningSource(
        ("prompt", "canonical_solution", "test", "entry_point"),
        _convert_humaneval,
        is_code=True,
        response="{answer}",
        hub_name="openai/openai_humaneval",
        splits=("test",),
    ),
    "mbpp": ReasoningSource(
        ("text", "code", "test_list", "test_setup_code"),
        _convert_mbpp,
        is_code=True,
        response="{answer}",
        hub_name="google-research-datasets/mbpp",
        hub_config="full",
        splits=("train", "test", "validation", "prompt"),
    ),
    "apps": ReasoningSource(
        ("question", "solutions", "input_output", "starter_code"),
        _convert_apps,
        is_code=True,
        response="{answer}",
        hub_name="codeparrot/apps",
        hub_files={split: f"hf://datasets/codeparrot/apps/{split}.jsonl" for split in ("train", "test")},
    ),
}
LOCAL_FILE = ReasoningSource(("prompt", "answer"), _convert_local)
LOCAL_CODE = ReasoningSource(
    ("prompt", "answer", "tests"), _convert_local, is_code=True, response="{reasoning}\n{answer}"
)
