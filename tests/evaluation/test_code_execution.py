"""Programs a model wrote: what passes, what is held back, and what is left behind."""

import gzip
import json
import socket
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from conftest import DATA

from llada_trm_hf.data import load_reasoning_dataset
from llada_trm_hf.evaluation import code_execution
from llada_trm_hf.evaluation.code_execution import ExecutionLimits, run_tests, sandbox_protections
from llada_trm_hf.evaluation.scoring import extract_code, score_output

LIMITS = ExecutionLimits(seconds=30, memory_mb=512)


@pytest.fixture(params=["as the system allows", "by the audit hook"])
def isolation(request, monkeypatch):
    """What careless code does is held back where the kernel does not help, too."""
    if request.param == "by the audit hook":
        monkeypatch.setattr(code_execution, "sandbox_protections", lambda: ())


def run_program(program, limits):
    """A program that tests itself."""
    return run_tests(program, "", limits=limits)


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Where the folders of programs are made."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    "program",
    [
        "assert sorted([2, 1]) == [1, 2]",
        "import math, re, collections\nassert math.gcd(4, 6) == 2",
        "open('mine', 'w').write('1')\nimport os\nos.remove('mine')",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()",
        "if __name__ == '__main__':\n    x = 1\nassert x",
        "print('x' * 10**6)",
    ],
)
def test_what_passes(program, scratch):
    assert run_program(program, LIMITS) == code_execution.ExecutionResult(True)
    assert not list(scratch.iterdir())


@pytest.mark.parametrize(
    "program, reason",
    [
        ("assert 1 == 2, 'one is not two'", "AssertionError: one is not two"),
        ("def f(:", "SyntaxError"),
        ("while True: pass", "time limit of 1 s"),
        ("import time\ntime.sleep(60)", "time limit of 1 s"),
        ("x = 'a' * 10**10", "MemoryError"),
        ("def f(): return f()\nf()", "RecursionError"),
        ("import sys\nsys.exit(0)", "SystemExit"),
        ("import os\nos._exit(0)", "the process ended before the program did"),
        ("import signal, os\nos.abort()", "the process ended before the program did"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("f = open('big', 'wb')\nwhile True: f.write(b'0' * 2**20)", "File too large"),
        ("import subprocess\nsubprocess.run(['true'])", "subprocess.Popen is not allowed"),
        ("import os\nos.fork()", "os.fork is not allowed"),
        ("open('../verdict', 'w').write('passed')", "not allowed outside"),
        ("import os\nos.utime('..')", "not allowed outside"),
        ("import sqlite3\nsqlite3.connect('../a.db')", "not allowed outside"),
    ],
)
def test_what_fails(program, reason, isolation, scratch):
    limits = ExecutionLimits(seconds=1) if reason.startswith("time limit") else LIMITS
    result = run_program(program, limits)
    assert not result.passed and reason in result.reason
    assert not list(scratch.iterdir())


def test_no_network(isolation):
    """A real server in this process, which nobody reaches."""
    reached = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            try:
                server.accept()
                reached.set()
            except OSError:
                pass

        listener = threading.Thread(target=serve)
        listener.start()
        port = server.getsockname()[1]
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}))"
        assert not run_program(program, LIMITS).passed
        server.shutdown(socket.SHUT_RDWR)
        listener.join()
    assert not reached.is_set()


def test_files_of_others_are_safe(isolation, tmp_path):
    precious = tmp_path / "thesis.txt"
    precious.write_text("precious")
    for attempt in (
        f"open({str(precious)!r}, 'w')",
        f"import os\nos.remove({str(precious)!r})",
        f"import shutil\nshutil.rmtree({str(tmp_path)!r})",
        f"import os\nos.rename({str(precious)!r}, 'mine')",
        f"import pathlib\npathlib.Path({str(tmp_path / 'new')!r}).mkdir()",
    ):
        assert "not allowed outside" in run_program(attempt, LIMITS).reason, attempt
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("thesis.txt", "precious")]


def test_no_process_survives(isolation):
    before = {process.pid for process in psutil.process_iter()}
    run_program("import time\ntime.sleep(60)", ExecutionLimits(seconds=0.5))
    mine = psutil.Process()
    left = [process for process in mine.children(recursive=True) if process.pid not in before]
    assert not left


def test_programs_at_the_same_time():
    """Each has its own pipes: nobody gets the answers of others."""
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda n: run_tests(f"def f(): return {n}", f"assert f() == {n // 2 * 2}"), range(8)))
    assert [result.passed for result in results] == [True, False] * 4


def test_lacking_protections_are_named_once(monkeypatch, caplog):
    monkeypatch.setattr(code_execution, "LAYERS", ("no such layer",))
    sandbox_protections.cache_clear()
    try:
        assert [sandbox_protections() for _ in range(2)] == [(), ()]
    finally:
        sandbox_protections.cache_clear()
    assert len(caplog.records) == 1 and "without no such layer" in caplog.text and "container" in caplog.text


def test_bad_limits():
    with pytest.raises(ValueError, match="Limits must be above 0"):
        ExecutionLimits(seconds=0)


# --- Programs in outputs ---

HEAD = 'from typing import List\n\ndef double(x: int) -> int:\n    """Twice x."""\n'


@pytest.mark.parametrize(
    "output",
    [
        "    return 2 * x\n",
        "    return 2 * x\n\nThis function doubles its argument.",
        "Here it is:\n```python\ndef double(x):\n    return 2 * x\n```\nFor example:\n```\nprint(double(2))\n```\n",
        "```python\ndef double(x: List) -> int:\n    return 2 * x",
        "<think>\n```python\ndef double(x): return 0\n```\n</think>\ndef double(x):\n    return 2 * x\n",
    ],
)
def test_the_program_in_an_output(output):
    problem = {"prompt": HEAD, "tests": "assert double(3) == 6", "entry_point": "double"}
    assert score_output("code", problem, "", output, LIMITS).correct
    assert not score_output("code", problem, "", output.replace("2 * x", "3 * x"), LIMITS).correct


def test_no_program():
    problem = {"prompt": HEAD, "tests": "assert double(3) == 6", "entry_point": "double"}
    for output in ("", "I would rather not.", "```python\n```"):
        score = score_output("code", problem, "", output, LIMITS)
        assert not score.correct and score.reason
    assert extract_code("x = 1\nand so on") == "x = 1\n"


@pytest.fixture(scope="module")
def data():
    if not (DATA / "humaneval").exists():
        pytest.skip(f"no HumanEval in {DATA}")
    return DATA


def test_published_solutions_of_humaneval_and_mbpp(data):
    """As a chat model and as a base model would write them; and a solution of another problem is wrong."""
    rows, _ = load_reasoning_dataset("humaneval", "test[:8]", str(data / "humaneval/HumanEval.jsonl.gz"))
    with gzip.open(data / "humaneval/HumanEval.jsonl.gz", "rt") as file:
        bodies = [json.loads(line)["canonical_solution"] for line in file]
    for i, (row, body) in enumerate(zip(rows, bodies)):
        assert score_output("code", row, "", f"Sure!\n```python\n{row['answer']}```").correct
        assert score_output("code", row, "", body).correct
        assert not score_output("code", row, "", bodies[i + 1]).correct
    rows, _ = load_reasoning_dataset("mbpp", "test[:8]", str(data / "mbpp/mbpp.jsonl"))
    for row in rows:
        assert score_output("code", row, "", f"```python\n{row['answer']}\n```\nDone.").correct


@pytest.mark.slow
def test_all_published_solutions(data):
    for name, path in (("humaneval", "humaneval/HumanEval.jsonl.gz"), ("mbpp", "mbpp/mbpp.jsonl")):
        rows, _ = load_reasoning_dataset(name, "test", str(data / path))
        failed = [row for row in rows if not run_tests(row["answer"], row["tests"], row["entry_point"]).passed]
        assert not failed, name
