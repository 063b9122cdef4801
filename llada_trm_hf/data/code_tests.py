"""
Tests of programs, as source text that raises when a solution is wrong. It uses what the solution defines or, if it
names `SOLUTION`, runs the solution itself: see `run_tests` in `evaluation.code_execution`. Nothing is run here.
"""

import ast
import json
from typing import Any

# What the harness of APPS (arXiv 2105.09938) imports for every solution, the common part of it.
_APPS_IMPORTS = """
import bisect, collections, functools, heapq, itertools, json, math, operator, random, re, string, sys
from collections import *
from functools import *
from itertools import *
from math import *
from typing import *
"""

_APPS_START = """
import json, sys

if hasattr(sys, "set_int_max_str_digits"):
    sys.set_int_max_str_digits(0)
CASES = json.loads({cases!r})
IMPORTS = {imports!r}
"""

# Results are compared as JSON, where a tuple is a list; some expected results stand in a list of their own.
_APPS_CALLS = """
SOLUTION.load(IMPORTS, "solution")
call = SOLUTION.find({name!r}) or getattr(SOLUTION.find("Solution")(), {name!r})
for arguments, expected in zip(CASES["inputs"], CASES["outputs"]):
    found = json.loads(json.dumps(call(*arguments)))
    assert found == expected or [found] == expected, (arguments, expected, found)
"""

# A program is started anew for every case, and may read and write bytes, call sys.exit() or work in a thread.
_APPS_PROGRAMS = """
def text(lines):
    return "\\n".join(lines) if isinstance(lines, list) else lines

def same(a, b):
    try:
        return a == b or abs(float(a) - float(b)) <= 1e-6 * max(1.0, abs(float(b)))
    except ValueError:
        return False

for given, expected in zip(CASES["inputs"], CASES["outputs"]):
    found, wanted = SOLUTION.run(text(given), IMPORTS).split(), text(expected).split()
    assert len(found) == len(wanted) and all(map(same, found, wanted)), (given, expected, found)
"""


def called_function(code: str, tests: list[str]) -> str:
    """The function of `code` that `tests` call first; ValueError if they call none, or something is not Python."""
    try:
        defined = {node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)}
        calls = [node.func for test in tests for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Call)]
    except SyntaxError as error:
        raise ValueError(f"its code or tests are not Python: {error}") from error
    for function in calls:
        if isinstance(function, ast.Name) and function.id in defined:
            return function.id
    raise ValueError("its tests call no function of its code.")


def apps_tests(input_output: str) -> tuple[str, str]:
    """
    Tests and entry point from the JSON text of an APPS problem: `{"inputs": [...], "outputs": [...]}`, of programs
    that read standard input, or with `fn_name`, of a function or of a method of `Solution`. Both are empty where a
    problem has no tests. Raises ValueError for any other text.
    """
    if not input_output.strip():
        return "", ""
    # Numbers stay text here: some have more digits than Python converts by default.
    try:
        cases: Any = json.loads(input_output, parse_int=str)
    except json.JSONDecodeError as error:
        raise ValueError(f"input_output is not valid JSON: {error}") from error
    if not isinstance(cases, dict) or not all(isinstance(cases.get(key), list) for key in ("inputs", "outputs")):
        raise ValueError(f"input_output must hold the lists inputs and outputs; got {input_output[:80]!r}.")
    if not cases["inputs"]:
        return "", ""
    name = cases.get("fn_name") or ""
    start = _APPS_START.format(cases=input_output, imports=_APPS_IMPORTS)
    return start + (_APPS_CALLS if name else _APPS_PROGRAMS).format(name=name), name
