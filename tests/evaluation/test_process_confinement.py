"""What the kernel takes from a program: one layer at a time, without the audit hook's help."""

import os
import secrets
import socket
import sqlite3
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from llada_trm_hf.evaluation import code_execution
from llada_trm_hf.evaluation.code_execution import ExecutionLimits, run_tests, sandbox_protections
from llada_trm_hf.evaluation.process_confinement import LAYERS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux' own")
LIMITS = ExecutionLimits(seconds=30, memory_mb=512)


@pytest.fixture
def only(monkeypatch):
    """Leaves programs a single layer, or none."""

    def leave(*layers):
        lacking = [layer for layer in layers if layer not in sandbox_protections()]
        if lacking:
            pytest.skip(f"this kernel, or this container, has no {lacking}")
        monkeypatch.setattr(code_execution, "sandbox_protections", lambda: layers)

    return leave


# Each raises, or returns something false, where it is held back. `libc` is what the audit hook does not see.
ATTEMPTS = {
    "create": "libc.creat(path('new'), 0o600) >= 0",
    "truncate": "libc.truncate(path('victim'), 0) == 0",
    "remove": "libc.unlink(path('other')) == 0",
    "rename": "libc.rename(path('other2'), path('renamed')) == 0",
    "symlink": "libc.symlink(b'/', path('link')) == 0",
    "mkdir": "libc.mkdir(path('folder'), 0o700) == 0",
    "sqlite": "sqlite3.connect(':memory:').executescript(f\"attach '{DIR}/a.db' as a; create table a.t(x)\")",
    "mkfifo": "os.mkfifo(path('fifo')) is None",
    "utime": "libc.utime(path('victim'), None) == 0",
    "chmod": "libc.chmod(path('victim'), 0o777) == 0",
    "setxattr": "libc.setxattr(path('victim'), b'user.x', b'1', 1, 0) == 0",
    "read": "open(path('secret')).read()",
    "environment": "len(open(f'/proc/{PARENT}/environ', 'rb').read()) and len(os.listdir(f'/proc/{PARENT}/fd'))",
    "memory": "libc.process_vm_readv(PARENT, vector, 1, vector, 1, 0) > 0 or libc.ptrace(16, PARENT, 0, 0) == 0",
    "network": "libc.connect(libc.socket(2, 1, 0), address, 16) == 0",
    "signal": "libc.kill(PARENT, 0) == 0",
    "fork": "fork()",
    "mount": "libc.mount(b'none', DIR.encode(), b'tmpfs', 0, None) == 0",
}
FILES = {"create", "truncate", "remove", "rename", "symlink", "mkdir", "sqlite", "mkfifo"}
ATTRIBUTES = {"utime", "chmod", "setxattr"}
HELD_BACK = {
    "namespaces": FILES | ATTRIBUTES | {"environment", "memory", "network", "signal", "mount"},
    "landlock": FILES | {"read", "environment", "memory", "network", "mount"},
    "seccomp": ATTRIBUTES | {"mkfifo", "memory", "network", "signal", "fork", "mount"},
}
PROGRAM = """
import ctypes, os, sqlite3, struct
libc = ctypes.CDLL(None)
PARENT, DIR = {parent}, {folder!r}
address = struct.pack("=H", 2) + struct.pack(">H", {port}) + bytes([127, 0, 0, 1]) + bytes(8)
room = ctypes.create_string_buffer(8)
vector = struct.pack("PN", {readable}, 1)

def path(name):
    return os.path.join(DIR, name).encode()

def fork():
    child = libc.fork()
    if child == 0:
        os._exit(0)
    return child > 0

def succeeded(attempts):
    found = []
    for name, attempt in attempts.items():
        try:
            if eval(attempt):
                found.append(name)
        except (OSError, sqlite3.Error):
            pass
    return found
"""


@pytest.fixture
def program():
    """Makes the program that attempts all that to files of a folder and a server here."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def make(folder):
            for name in ("victim", "other", "other2", "secret"):
                (folder / name).write_text("precious")
            port = server.getsockname()[1]
            return PROGRAM.format(parent=os.getpid(), folder=str(folder), port=port, readable=id(port))

        yield make


def state(folder):
    found = ((path, path.stat()) for path in folder.iterdir())
    return {path.name: (path.read_text(), status.st_mtime_ns, status.st_mode) for path, status in found}


@pytest.mark.parametrize("layer", LAYERS)
def test_what_a_layer_holds_back(layer, only, program, tmp_path):
    only(layer)
    source = program(tmp_path)
    before = state(tmp_path)
    held = {name: attempt for name, attempt in ATTEMPTS.items() if name in HELD_BACK[layer]}
    tests = f"found = succeeded({held!r})\nassert found == [], found"
    result = run_tests(source, tests, limits=LIMITS)
    assert result.passed, result.reason
    assert state(tmp_path) == before


def test_the_attempts_are_real(only, program, tmp_path):
    """Without any layer they succeed, but for what a process without capabilities may not do in any case."""
    only()
    expected = (FILES | ATTRIBUTES | {"read", "network", "signal", "fork"}) - {"setxattr"}
    tests = f"missing = set({sorted(expected)}) - set(succeeded({ATTEMPTS!r}))\nassert not missing, missing"
    result = run_tests(program(tmp_path), tests, limits=LIMITS)
    assert result.passed, result.reason
    assert sqlite3.connect(tmp_path / "a.db").execute("select count(*) from t").fetchone() == (0,)


DAEMONS = """
import ctypes, os, time
libc = ctypes.CDLL(None)
def start():
    for _ in range(5):
        if libc.fork() == 0:
            {leave}
            if libc.fork() == 0:
                libc.prctl(15, {name!r}.encode(), 0, 0, 0)
                libc.prctl(1, 0, 0, 0, 0)
                time.sleep(60)
            os._exit(0)
    time.sleep(0.3)
    return True
"""


def running(name):
    return [process for process in psutil.process_iter(["name"]) if process.info["name"] == name]


def wait_until(holds):
    end = time.monotonic() + 30
    while not holds() and time.monotonic() < end:
        time.sleep(0.05)
    return holds()


@pytest.mark.parametrize("layer, leave", [("namespaces", "os.setsid()"), ("seccomp", "os.setsid()"), (None, "pass")])
def test_no_daemon_survives(layer, leave, only):
    """Not even one that left its session; without any layer, as long as it stays in it."""
    only(*([layer] if layer else []))
    name = secrets.token_hex(7)
    result = run_tests(DAEMONS.format(name=name, leave=leave), "assert start()", limits=LIMITS)
    assert result.passed
    assert wait_until(lambda: not running(name))


RUNNER = """
import sys, types
package = types.ModuleType("evaluation")
package.__path__ = [{folder!r}]
sys.modules["evaluation"] = package
from evaluation import code_execution
code_execution.sandbox_protections = lambda: {layers!r}
program = "import ctypes, time; ctypes.CDLL(None).prctl(15, b'{name}', 0, 0, 0); time.sleep(100)"
code_execution.run_tests(program, "", limits=code_execution.ExecutionLimits(seconds=100))
"""


@pytest.mark.parametrize("layers", [(), ("namespaces",)])
def test_a_program_does_not_outlive_a_killed_evaluation(layers, only):
    only(*layers)
    name = secrets.token_hex(7)
    folder = os.path.dirname(code_execution.__file__)
    process = subprocess.Popen([sys.executable, "-c", RUNNER.format(folder=folder, layers=layers, name=name)])
    try:
        assert wait_until(lambda: running(name))
    finally:
        process.kill()
        process.wait()
    assert wait_until(lambda: not running(name))


def test_files_are_bounded_together(only):
    """Each to 16 MB by a limit, all of them to 64 MB by the file system of their own."""
    only("namespaces")
    program = """
    def written():
        for n in range(20):
            with open(f"part{n}", "wb") as file:
                try:
                    file.write(bytes(2**23))
                except OSError:
                    return n
    """
    assert run_tests(textwrap.dedent(program), "assert 6 <= written() <= 8", limits=LIMITS).passed


def test_the_folder_is_the_program_s(only, tmp_path):
    """With every layer it is an ordinary folder, in which databases work, too."""
    only(*sandbox_protections())
    program = """
    import os, sqlite3, tempfile, threading
    def use():
        with sqlite3.connect("own.db") as base:
            base.executescript("create table t(x); insert into t values (42)")
        with tempfile.TemporaryDirectory() as name:
            open(os.path.join(name, "a"), "w").write("b")
        os.mkdir("folder")
        os.rename("own.db", "folder/own.db")
        found = []
        thread = threading.Thread(target=lambda: found.append(sorted(os.listdir("."))))
        thread.start()
        thread.join()
        return found[0], sqlite3.connect("folder/own.db").execute("select x from t").fetchall()
    """
    result = run_tests(textwrap.dedent(program), "assert use() == (['folder'], [(42,)])", limits=LIMITS)
    assert result.passed, result.reason


def test_a_folder_nested_beyond_python_s_recursion_is_deleted(only, tmp_path, monkeypatch):
    only()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    program = "import ctypes\nlibc = ctypes.CDLL(None)\ndef nest():\n    for _ in range(1100):\n"
    program += "        libc.mkdir(b'a', 0o700)\n        libc.chdir(b'a')\n    return True"
    assert run_tests(program, "assert nest()", limits=LIMITS).passed
    assert not list(tmp_path.iterdir())
