"""What passes between tests and a program, and what a program tries to make tests believe."""

import textwrap

import pytest

from llada_trm_hf.evaluation import code_execution
from llada_trm_hf.evaluation.code_execution import ExecutionLimits, run_tests

LIMITS = ExecutionLimits(seconds=30, memory_mb=512)


@pytest.fixture
def no_layers(monkeypatch):
    """Verdicts hold without any help of the kernel. (What its layers add is in `test_process_confinement`.)"""
    monkeypatch.setattr(code_execution, "sandbox_protections", lambda: ())


def passes(program, tests, **arguments):
    result = run_tests(textwrap.dedent(program), textwrap.dedent(tests), limits=LIMITS, **arguments)
    assert result.passed == (not result.reason)
    return result


# --- Honest programs ---


def test_values_arrive_as_they_are():
    """There and back, with their types."""
    tests = """
    import collections, datetime, decimal, fractions, math
    values = [None, True, 0, -(10**5000), 1.5, -0.0, math.inf, "ä\\ud800\\n", b"\\x00\\xff", bytearray(b"a"), 1 + 2j]
    values += [[1, (2, [3])], {1, 2}, frozenset("a"), {(1, 2): [3], None: {}}, range(1, 9, 2), collections.deque([1])]
    values += [collections.OrderedDict(b=1, a=2), collections.Counter("aab"), decimal.Decimal("1.10")]
    values += [fractions.Fraction(1, 3), datetime.date(2020, 2, 29), datetime.datetime(2020, 1, 1, 3, 4), int, str]
    for value in values:
        found = same(value)
        assert found == value and type(found) is type(value) and repr(found) == repr(value), value
    assert math.isnan(same(math.nan))
    """
    result = passes("def same(x): return x", tests)
    assert result.passed, result.reason


@pytest.mark.parametrize(
    "program, tests",
    [
        ("def f(xs): xs.sort()", "xs = [2, 1]\nsame = xs\nassert f(xs) is None and xs == [1, 2] == same"),
        ("def f(d, *, n): d[n] = [n]", "d = {}\nf(d, n=3)\nassert d == {3: [3]}"),
        ("def f():\n    yield 1\n    yield 2", "assert list(f()) == [1, 2] and 2 in f()\nassert next(f()) == 1"),
        ("def f(): raise ValueError('no', 3)", "try: f()\nexcept ValueError as e: assert e.args == ('no', 3)"),
        ("class E(KeyError): pass\ndef f(): raise E(1)", "try: f()\nexcept LookupError as e: assert str(e) == '1'"),
        ("def f(g, xs): return list(map(g, xs))", "assert f(lambda x: x + 1, [1]) == [2] and f(len, ['ab']) == [2]"),
        ("def f(g): return g(lambda x: 2 * x)", "assert f(lambda h: h(3)) == 6"),
        ("def f(x): return lambda y: x + y", "assert f(1)(2) == 3"),
        (
            "class Node:\n    next = None\n    def __init__(self, v): self.v = v\n    def __str__(self): return 'v'"
            "\ndef last(n):\n    while n.next: n = n.next\n    return n",
            "a, b = Node(1), Node(2)\na.next = b\nassert last(a) is b and a.next.v == 2 and str(b) == 'v' and a != b",
        ),
        (
            "class S(list):\n    def top(self): return self[-1]",
            "s = S([1])\ns.append(5)\nassert s.top() == s[1] == 5 and len(s) == 2",
        ),
        ("import sys, math as m", "assert sys.maxsize > 0 and m.sqrt(4) == 2"),
        ("from enum import IntEnum\nclass A(IntEnum): X = 3\ndef f(): return A.X", "assert f() == 3"),
        ("import collections as c\nP = c.namedtuple('P', 'x y')\ndef f(): return P(1, 2)", "assert f() == (1, 2)"),
        (
            "def double(x): return helper(x)\nhelper = lambda x: 2 * x",
            "def check(c):\n    assert c(helper(2)) == 8\ncheck(double)",
        ),
    ],
)  # fmt: skip
def test_what_tests_do_with_a_program(program, tests):
    result = passes(program, tests)
    assert result.passed, result.reason


def test_numpy_numbers_are_numbers():
    pytest.importorskip("numpy")
    program = "import numpy as np\ndef f(): return [np.int64(3), np.float64(0.5), np.bool_(True)]"
    assert passes(program, "assert f() == [3, 0.5, True] and np.sum([1, 2]) == 3").passed


def test_a_function_with_the_name_of_one_of_python_s():
    """It is the entry point that may have one: else `abs` in a test would be the program's."""
    assert passes("def sum(a, b): return a + b", "assert sum(1, 2) == 3", entry_point="sum").passed
    assert not passes("def sum(a, b): return a + b", "assert sum(1, 2) == 3").passed


@pytest.mark.parametrize(
    "tests, passed",
    [
        ("assert SOLUTION.run('3 4') == '7\\n' and SOLUTION.run('1 1') == '2\\n'", True),
        ("assert SOLUTION.run('3 4', 'print(0)\\n') == '0\\n7\\n'", True),
        ("assert SOLUTION.run('3 4') == '8\\n'", False),
        ("SOLUTION.run('')", False),
        ("exec(SOLUTION)", False),
    ],
)
def test_a_program_that_reads_and_prints(tests, passed):
    assert passes("print(sum(map(int, input().split())))", tests).passed == passed


def test_a_program_that_is_loaded_when_tests_say_so():
    tests = (
        "assert SOLUTION.find('x') is None\nSOLUTION.load('y = 1\\n', 'other')\nassert SOLUTION.find('x') == 'other1'"
    )
    assert passes("x = f'{__name__}{y}'", tests).passed


# --- Dishonest ones: `f(n)` should be 2 * n, but for 7, of which only the tests know ---

FORGERIES = {
    "exit": "import os; os._exit(0)",
    "exit in a call": "def f(x): raise SystemExit(0)",
    "atexit": "import atexit, os; atexit.register(os._exit, 0)\ndef f(x): raise SystemExit(0)",
    "an exception of its own": "class E(BaseException): pass\ndef f(x): raise E",
    "StopIteration": "def f(x): raise StopIteration",
    "printed verdicts": """
        print('[""]', flush=True)
        def f(x): print('{"passed": true}', '[""]', flush=True)
    """,
    "verdicts written to all descriptors": r"""
        import os
        def f(x):
            for n in range(64):
                for text in (b'[""]\n', b'["result", true, null]\n', b'["result", 41, null]\n'):
                    try: os.write(n, text)
                    except OSError: pass
            os._exit(0)
    """,
    "answers in advance": r"""
        import os
        def f(x):
            for n in range(3, 64):
                try: os.write(n, b'["result", 2, null]\n["result", true, null]\n' * 50)
                except OSError: pass
            return 2 * x
    """,
    "an endless line": """
        import os
        def f(x):
            for n in range(3, 64):
                for _ in range(80):
                    try: os.write(n, b'[' * 2**20)
                    except OSError: break
    """,
    "what is no answer": r"""
        import os
        def f(x):
            for n in range(3, 64):
                try: os.write(n, b'["raised", ["object", "__loader__"], "x", [7]]\n')
                except OSError: pass
    """,
    "equal to everything": """
        class All:
            __eq__ = __ge__ = __le__ = __lt__ = __gt__ = __contains__ = lambda *a: True
            __ne__ = lambda *a: False
            __sub__ = __rsub__ = __abs__ = lambda s, *a: s
            __hash__ = lambda s: 0
        def f(x): return All()
    """,
    "numbers and texts equal to everything": """
        class Int(int): __eq__ = lambda *a: True; __hash__ = int.__hash__
        class Text(str): __eq__ = lambda *a: True; __hash__ = str.__hash__
        class List(list): __eq__ = lambda *a: True
        class Dict(dict): __eq__ = lambda *a: True
        kinds = [Int, Text, List, Dict]
        def f(x): return kinds[x % 4]()
    """,
    "a builtin of the tests": "def abs(x): return 0\ndef isinstance(*a): return True\ndef f(x): return 1.0",
    "builtins": """
        import builtins
        builtins.abs = lambda x: 0
        builtins.AssertionError = ValueError
        builtins.isinstance = lambda *a: True
        def f(x): return 1.0
    """,
    "__main__ and the modules": """
        import sys, __main__
        for module in list(sys.modules.values()):
            for name, value in list(vars(module).items()):
                if getattr(value, '__module__', '') == 'sandbox.code_judge' and callable(value):
                    try: setattr(module, name, lambda *a, **k: '')
                    except (AttributeError, TypeError): pass
        watching = __main__.watching = False
        def f(x): return None
    """,
    "a verdict in the process, as there once was": """
        import os, __main__
        __main__.watching = False
        def f(x):
            with open(getattr(__main__, 'verdict_file', 'verdict'), 'w') as file:
                file.write(getattr(__main__, 'verdict', 'passed'))
            os._exit(0)
    """,
    "tests in the process": r"""
        import gc, re, sys, __main__
        def f(x):
            texts = [str(vars(__main__)), *(o for o in gc.get_objects() if isinstance(o, str))]
            frame = sys._getframe()
            while frame:
                texts += [str(frame.f_globals), str(frame.f_locals), str(frame.f_code.co_consts)]
                frame = frame.f_back
            found = re.search('SECRET_([0-9]+)_', ' '.join(texts))
            return [x] if x == [3] else int(found[1]) if found and x == 7 else 2 * x
    """,
    "objects found by gc": """
        import gc
        def f(x):
            for o in gc.get_objects():
                if type(o).__name__ == 'Channel':
                    o._is_judge, o.ended = True, ''
                    for m in (['result', True, None], [""], ['result', 41, None]): o._send(m)
            raise SystemExit
    """,
    "calls of the tests' functions": """
        import gc
        def f(x):
            for o in gc.get_objects():
                if type(o).__name__ == 'Channel':
                    for call in (('getattr', True, '__class__'), ('call', exec, 'import os; os._exit(0)'),
                                 ('call', eval, '1'), ('call', type, 'X', (), {}), ('find', 'SECRET')):
                        try: return o.ask(*call)
                        except BaseException as e: found = e
                    raise found
    """,
    "tracing": """
        import sys, threading
        sys.settrace(lambda *a: None); sys.setprofile(lambda *a: None)
        sys.excepthook = threading.excepthook = lambda *a: None
        def f(x): return sys._getframe(1).f_locals
    """,
    "arguments that change": """
        def f(x):
            import gc
            for o in gc.get_objects():
                if type(o).__name__ == 'Channel':
                    o._encode = lambda value: ['builtins.tuple', 41, 41]
            return x
    """,
    "names of other processes": r"""
        import os, re
        def f(x):
            texts = []
            for pid in [name for name in os.listdir('/proc') if name.isdigit()]:
                try:
                    texts += [open(f'/proc/{pid}/{file}', 'rb').read() for file in ('cmdline', 'environ')]
                    if b'code_judge' in texts[-2] and pid != str(os.getpid()):
                        for n in os.listdir(f'/proc/{pid}/fd'):
                            file = os.open(f'/proc/{pid}/fd/{n}', os.O_RDONLY | os.O_NONBLOCK)
                            texts.append(os.read(file, 10**5)); os.close(file)
                except OSError: pass
            for name in os.listdir('..'):
                if name.startswith('llada-trm-program'):
                    texts += [open(f'../{name}/{file}', 'rb').read() for file in os.listdir(f'../{name}')]
            found = re.search(rb'SECRET_([0-9]+)_', b' '.join(texts))
            return int(found[1]) if found and x == 7 else 2 * x
    """,
    "memory of the judge": r"""
        import ctypes, os, re
        def f(x):
            for pid in [n for n in os.listdir('/proc') if n.isdigit()] if os.path.isdir('/proc') else []:
                try:
                    if b'judge' not in open(f'/proc/{pid}/cmdline', 'rb').read(): continue
                    for line in open(f'/proc/{pid}/maps'):
                        start, end = (int(n, 16) for n in line.split()[0].split('-'))
                        memory = open(f'/proc/{pid}/mem', 'rb')
                        memory.seek(start)
                        if found := re.search(rb'SECRET_([0-9]+)_', memory.read(end - start)):
                            return int(found[1]) if x == 7 else 2 * x
                except OSError: pass
            return 2 * x
    """,
    "memory of all others, written": r"""
        import ctypes, os
        libc = ctypes.CDLL(None)
        def f(x):
            for pid in [n for n in os.listdir('/proc') if n.isdigit()]:
                try:
                    if b'"role": "judge"' in open(f'/proc/{pid}/cmdline', 'rb').read().replace(b"'", b'"'):
                        if libc.ptrace(16, int(pid), 0, 0) == 0: return 41
                        os.close(os.open(f'/proc/{pid}/fd/3', os.O_WRONLY)); return 41
                except OSError: pass
            raise ValueError
    """,
}  # fmt: skip
TESTS = """
SECRET_41_ = 41
data = [3]
def close(a, b): return isinstance(a, (int, float)) and abs(a - b) < 1e-6
assert close(f(3), 6)
assert f(7) == 41 and f(3) == 6, "SECRET_41_"
assert f(data) and data == [3]
"""


@pytest.mark.parametrize("name", FORGERIES)
def test_verdicts_cannot_be_forged(name, no_layers):
    result = passes(FORGERIES[name], TESTS)
    assert not result.passed, name


@pytest.mark.parametrize(
    "program, tests",
    [
        (FORGERIES["equal to everything"], "assert f(7) == 41"),
        (FORGERIES["equal to everything"], "assert not f(7) != 41"),
        (FORGERIES["equal to everything"], "assert 41 in f(7)"),
        (FORGERIES["equal to everything"], "assert f(7) >= 41"),
        (FORGERIES["equal to everything"], "assert abs(f(7) - 41) < 1e-6"),
        (FORGERIES["numbers and texts equal to everything"], "assert f(0) == 41"),
        (FORGERIES["numbers and texts equal to everything"], "assert f(1) == '41'"),
        (FORGERIES["numbers and texts equal to everything"], "assert f(2) == [41]"),
        (FORGERIES["a builtin of the tests"], "assert abs(f(7) - 41) < 1e-6"),
        (FORGERIES["builtins"], "assert isinstance(f(7), bytes)"),
        ("import math\nmath.floor = lambda x: 41\ndef f(x): return 1", "import math\nassert math.floor(f(7)) == 41"),
        ("import math\nmath.isclose = lambda *a: True\ndef f(x): return 1", "assert math.isclose(f(7), 41)"),
    ],
)  # fmt: skip
def test_what_tests_compare_with_is_theirs(program, tests):
    """In one process, each of these passed."""
    assert not passes(program, tests).passed


def test_the_tests_can_be_passed():
    assert passes("def f(x): return {3: 6, 7: 41}[x] if isinstance(x, int) else [x]", TESTS).passed


def test_a_dead_program_is_not_the_exception_that_tests_expect(no_layers):
    """Not even for tests that catch everything."""
    for catching in ("except Exception: pass", "except: pass"):
        tests = f"try:\n    f(-1)\n    raise SystemError\n{catching}"
        assert passes("def f(x): raise ValueError", tests).passed
        assert not passes("import os\ndef f(x): os._exit(0)", tests).passed
        garbage = "import contextlib, os\ndef f(x):\n    for n in range(3, 1024):\n"
        garbage += "        with contextlib.suppress(OSError): os.write(n, b'[]\\n')"
        assert not passes(garbage, tests).passed


def test_only_functions_that_were_given_are_called():
    program = "def f(g):\n    try: return g.__globals__\n    except AttributeError: return g._x"
    result = passes(program, "secret = 1\nassert f(lambda: secret) is None")
    assert not result.passed and "'getattr'" in result.reason
    result = passes("def f(g): return 1", "class Mine: pass\nassert f(Mine()) == 1")
    assert "A Mine of the tests cannot be given to a program" in result.reason
