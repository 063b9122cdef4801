"""A program that hangs fails its test, which then knows where it hung."""

import subprocess
import sys
import time

import psutil
import pytest
from run_programs import run_program, talk_to

SLEEP = "def dream():\n    time.sleep(100)\n"
PARENT = f"""
import subprocess, sys, time
from pathlib import Path
child = subprocess.Popen([sys.executable, "-c", '''import time\n{SLEEP}dream()'''], start_new_session=True)
Path(sys.argv[1]).write_text(str(child.pid))
time.sleep({{seconds}})
"""


def ended(file):
    end, process = time.monotonic() + 10, int(file.read_text())
    while psutil.pid_exists(process) and time.monotonic() < end:
        time.sleep(0.05)
    return not psutil.pid_exists(process)


def test_what_hangs_is_ended_with_its_children_and_their_stacks(tmp_path):
    command = [sys.executable, "-c", PARENT.format(seconds=100), str(tmp_path / "child")]
    with pytest.raises(AssertionError, match=r"test_what_hangs_is_ended.* had not ended after 4 s") as error:
        run_program(command, seconds=4)
    assert str(error.value).count("Fatal Python error: Aborted") == 2 and "in dream" in str(error.value)
    assert ended(tmp_path / "child")


def test_a_child_that_stays_does_not_keep_its_parent_waiting(tmp_path):
    result = run_program([sys.executable, "-c", PARENT.format(seconds=0), str(tmp_path / "child")], seconds=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    psutil.Process(int((tmp_path / "child").read_text())).kill()


def test_input_output_and_code():
    program = "import sys; print(input()); print('bad', file=sys.stderr); sys.exit(3)"
    result = run_program([sys.executable, "-c", program], input="good\n")
    assert (result.returncode, result.stdout, result.stderr) == (3, "good\n", "bad\n")
    with pytest.raises(AssertionError, match="bad"):
        run_program([sys.executable, "-c", program], input="good\n", check=True)


def test_one_that_is_talked_to():
    program = f"import sys, time\n{SLEEP}print('hello', flush=True)\ndream()"
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with talk_to([sys.executable, "-c", program], seconds=3, **streams) as process:
        said = process.stdout.read()
    assert said.startswith("hello") and "in dream" in said and process.returncode != 0
