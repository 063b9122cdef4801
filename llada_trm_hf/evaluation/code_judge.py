"""
Tests in one interpreter, the program they test in another, and what passes between the two.

The interpreter of the tests asks for a call, and the other answers with *values*: numbers, texts, and containers of
the standard library, as lines of JSON in which nothing is executed. So what the tests compare is theirs, and a program
can neither change them nor see what they expect. Any other object stays where it is; the tests hold a `RemoteObject`,
which is equal to nothing but itself.

Runs as a script in fresh interpreters that `code_execution` starts, and imports nothing but the standard library.
"""

import builtins
import importlib
import io
import json
import operator
import os
import site
import sys
import threading
import types
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from .process_confinement import confine, refuse_outside

_LONGEST_LINE, _LONGEST_REASON = 2**26, 10_000
_PLAIN = (type(None), bool, int, float, str)
# Types that cross as values: what they are made of on the other side, and how.
_CONTAINERS = {"builtins": ("list", "tuple", "set", "frozenset"), "collections": ("deque",)}
_MAPPINGS = {"builtins": ("dict",), "collections": ("OrderedDict", "Counter", "defaultdict")}
_WRITTEN = {"decimal": ("Decimal",), "fractions": ("Fraction",), "datetime": ("date", "time", "datetime")}
_MODULES_OF_TESTS = sys.stdlib_module_names | {"numpy"}


class ProgramStopped(BaseException):
    """The program ended, or sent what is no answer. Tests that expect an Exception do not expect this."""


class RemoteObject:
    """
    An object of the other process: its attributes, calls, items, length, truth, iteration and text. It has no `==`,
    `<` or arithmetic, whose results a program could make up without knowing with what it is compared.
    """

    __slots__ = ("_ask", "_number")

    def __init__(self, ask: Callable[..., Any], number: int):
        object.__setattr__(self, "_ask", ask)
        object.__setattr__(self, "_number", number)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._ask("call", self, *arguments, **named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"{name} of an object of the program")
        return self._ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("setattr", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._ask("getitem", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._ask("setitem", self, key, value)

    def __len__(self) -> int:
        return self._ask("len", self)

    def __bool__(self) -> bool:
        return self._ask("bool", self)

    def __iter__(self) -> Any:
        return self._ask("iter", self)

    def __next__(self) -> Any:
        return self._ask("next", self)

    def __repr__(self) -> str:
        return self._ask("repr", self)

    def __str__(self) -> str:
        return self._ask("str", self)


class Channel:
    """
    One end of two pipes. `ask` sends a call and returns its result; meanwhile it serves the calls of the other side,
    such as of a function in its arguments.

    Args:
        reading, writing: descriptors of the pipes.
        operations: the calls that the other side may ask for.
        is_judge: of the tests: it shares nothing but its own functions, to be called, and trusts no answer.
    """

    def __init__(self, reading: int, writing: int, operations: dict[str, Callable], is_judge: bool):
        self._reading, self._writing = os.fdopen(reading, "rb"), writing
        self._operations, self._is_judge = operations, is_judge
        self._shared: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._remote: dict[int, RemoteObject] = {}
        self.ended = ""

    def ask(self, operation: str, *arguments: Any, **named: Any) -> Any:
        self._send(["ask", operation, self._encode(arguments), self._encode(named)])
        while (message := self._receive())[0] == "ask":
            self._answer(*message[1:])
        if message[0] == "raised":
            raise self._trusted(_exception, *message[1:3], self._trusted(self._decode, message[3]))
        if message[2] is not None:
            for old, new in zip(arguments, self._trusted(self._decode, message[2])):
                _update(old, new)
        return self._trusted(self._decode, message[1])

    def serve(self) -> None:
        """Answers until the other side ends."""
        while True:
            self._answer(*self._receive()[1:])

    def _answer(self, operation: str, sent: Any, sent_named: Any) -> None:
        try:
            arguments, named = self._decode(sent), self._decode(sent_named)
            result = self._encode(self._operations[operation](*arguments, **named))
            after = self._encode(arguments)
            self._send(["result", result, None if after == sent else after])
        except ProgramStopped:
            raise
        except BaseException as error:  # the program's, which may well exit
            self._send(self._raised(error))

    def _raised(self, error: BaseException) -> list[Any]:
        names = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
        try:
            text = f"{type(error).__name__}: {error}".rstrip(": ")
            return ["raised", names, text, self._encode(error.args)]
        except BaseException:
            return ["raised", names, type(error).__name__, ["builtins.tuple"]]

    def _send(self, message: list[Any]) -> None:
        line = json.dumps(message).encode() + b"\n"
        try:
            while line:
                line = line[os.write(self._writing, line) :]
        except OSError:
            self._stop("the process ended before the program did")

    def _receive(self) -> list[Any]:
        line = self._reading.readline(_LONGEST_LINE)
        if not line:
            self._stop("the process ended before the program did")
        return self._trusted(_message, line)

    def _trusted(self, read: Callable, *arguments: Any) -> Any:
        """What the other side sent, read; where that fails, it is the other side's fault, not an error of a test."""
        try:
            return read(*arguments)
        except Exception as error:
            self._stop(f"the program answered with what is no value ({type(error).__name__})")

    def _stop(self, reason: str) -> None:
        self.ended = self.ended or reason
        raise ProgramStopped(self.ended)

    def _encode(self, value: Any) -> Any:
        """For JSON: plain values as they are, others as [type or kind, *parts]."""
        kind = type(value)
        if kind in _PLAIN:
            return value
        if kind is RemoteObject:
            return ["yours", object.__getattribute__(value, "_number")]
        module, name = kind.__module__, kind.__name__
        tag = f"{module}.{name}"
        if name in _CONTAINERS.get(module, ()):
            return [tag, *map(self._encode, value)]
        if name in _MAPPINGS.get(module, ()):
            return [tag, *([self._encode(key), self._encode(item)] for key, item in value.items())]
        if name in _WRITTEN.get(module, ()):
            return [tag, value.isoformat() if module == "datetime" else str(value)]
        if kind in (bytes, bytearray):
            return [tag, value.decode("latin-1")]
        if kind is complex:
            return [tag, value.real, value.imag]
        if kind is range:
            return [tag, value.start, value.stop, value.step]
        for base in (int, float, str):  # such as an IntEnum
            if isinstance(value, base):
                return base(value) if base is not str else str.__str__(value)
        if isinstance(value, tuple):  # such as a named one
            return ["builtins.tuple", *map(self._encode, value)]
        if module == "numpy" and getattr(value, "shape", None) == ():
            return self._encode(value.item())
        return self._encode_reference(value)

    def _encode_reference(self, value: Any) -> Any:
        if isinstance(value, types.ModuleType) and value.__name__ in _MODULES_OF_TESTS:
            return ["module", value.__name__]
        # The tests may give a program any function of Python's; they accept only types, which can do no harm.
        if isinstance(value, (type, types.BuiltinFunctionType) if self._is_judge else type):
            name = value.__name__
            if getattr(builtins, name, None) is value:
                return ["builtin", name]
        if self._is_judge and not isinstance(value, types.FunctionType):
            raise TypeError(f"A {type(value).__name__} of the tests cannot be given to a program in another process.")
        number = self._numbers.setdefault(id(value), len(self._shared))
        if number == len(self._shared):
            self._shared.append(value)
        return ["mine", number]

    def _decode(self, sent: Any) -> Any:
        if not isinstance(sent, list):
            return sent
        tag, *parts = sent
        if tag == "mine":
            return self._remote.setdefault(parts[0], RemoteObject(self.ask, parts[0]))
        if tag == "yours":
            return self._shared[parts[0]]
        if tag == "builtin":
            return self._decode_builtin(parts[0])
        if tag == "module":
            return importlib.import_module(_known_module(parts[0]))
        return _made(tag, parts, self._decode)

    def _decode_builtin(self, name: str) -> Any:
        value = getattr(builtins, name)
        if self._is_judge and not isinstance(value, type):
            raise TypeError(f"{name} is no type.")
        return value


def _message(line: bytes) -> list[Any]:
    message = json.loads(line)
    kind, parts = message[0], len(message)
    if (kind, parts) not in (("ask", 4), ("result", 3), ("raised", 4)):
        raise ValueError(kind)
    return message


def _made(tag: str, parts: list[Any], decode: Callable[[Any], Any]) -> Any:
    """A value of one of the types that cross."""
    module, _, name = tag.partition(".")
    if name in _CONTAINERS.get(module, ()):
        return getattr(importlib.import_module(module), name)(map(decode, parts))
    if name in _MAPPINGS.get(module, ()):
        made = getattr(importlib.import_module(module), name)()
        made.update({decode(key): decode(item) for key, item in parts})
        return made
    if name in _WRITTEN.get(module, ()):
        kind = getattr(importlib.import_module(module), name)
        return kind.fromisoformat(*parts) if module == "datetime" else kind(*parts)
    if name in ("bytes", "bytearray"):
        return getattr(builtins, name)(parts[0], "latin-1")
    kinds = {"builtins.complex": complex, "builtins.range": range}
    return kinds[tag](*parts)


def _known_module(name: str) -> str:
    if name not in _MODULES_OF_TESTS:
        raise ImportError(f"{name} is no module of the standard library.")
    return name


def _exception(names: list[str], text: str, arguments: tuple[Any, ...]) -> BaseException:
    """The exception of the other side, as the first of its classes that is built into Python."""
    for name in names:
        kind = getattr(builtins, name)
        if issubclass(kind, Exception):
            try:
                return kind(*arguments)
            except TypeError:
                return RuntimeError(text)
    return ProgramStopped(text)


def _update(old: Any, new: Any) -> None:
    """Gives an argument the content it has after the call."""
    if type(old) is not type(new):
        return
    if isinstance(old, tuple):
        for pair in zip(old, new):
            _update(*pair)
    elif isinstance(old, (list, bytearray)):
        old[:] = new
    elif isinstance(old, (dict, set)):
        old.clear()
        old.update(new)
    elif isinstance(old, deque):
        old.clear()
        old.extend(new)


# --- The program's interpreter ---


class Program:
    """Runs the program when asked, and hands out what it defines."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {}

    def load(self, source: str, name: str) -> None:
        self.names["__name__"] = name
        exec(compile(source, "program.py", "exec"), self.names)

    def find(self, name: str) -> list[Any]:
        """What the program calls so, alone in a list, or an empty one."""
        return [self.names[name]] if name in self.names else []

    def run(self, source: str, given: str) -> str:
        """What the program prints when it is started anew with `given` on its standard input."""
        program, terminal = compile(source, "program.py", "exec"), sys.stdout
        sys.stdin = io.TextIOWrapper(io.BytesIO(given.encode()))
        sys.stdout = io.TextIOWrapper(io.BytesIO(), write_through=True)
        with suppress(SystemExit):
            exec(program, {"__name__": "__main__"})
        for thread in threading.enumerate():
            if thread is not threading.current_thread():
                thread.join()
        printed, sys.stdout = sys.stdout, terminal
        return printed.buffer.getvalue().decode()  # type: ignore[attr-defined]

    def operations(self) -> dict[str, Callable]:
        named: dict[str, Callable] = {"call": _call, "getitem": operator.getitem, "setitem": operator.setitem}
        named |= {kind.__name__: kind for kind in (getattr, setattr, len, bool, iter, next, repr, str)}
        return named | {"load": self.load, "find": self.find, "run": self.run}


def _call(function: Callable, *arguments: Any, **named: Any) -> Any:
    return function(*arguments, **named)


def _call_of_tests(function: Callable, *arguments: Any, **named: Any) -> Any:
    """All that a program may ask of the tests: to call a function that it got as an argument."""
    if not isinstance(function, types.FunctionType):
        raise TypeError(f"A {type(function).__name__} is no function of the tests.")
    return function(*arguments, **named)


# --- The tests' interpreter ---


class Solution:
    """The program, for tests that name SOLUTION: it runs when they say so, with a `preamble` of theirs before it."""

    def __init__(self, channel: Channel, source: str):
        self._channel, self._source = channel, source

    def load(self, preamble: str = "", name: str = "__main__") -> None:
        """Runs it once, under that `__name__`, so that what it defines can be found."""
        self._channel.ask("load", preamble + self._source, name)

    def find(self, name: str) -> Any:
        """What it defines under that name, or None."""
        return next(iter(self._channel.ask("find", name)), None)

    def run(self, given: str, preamble: str = "") -> str:
        """Its standard output, started anew with `given` on its standard input."""
        return self._channel.ask("run", preamble + self._source, given)


class NamesOfTests(dict):
    """
    The global names of the tests. What they do not define is Python's own, then the program's; of `entry_point` the
    program's is first. A module is the tests' own, whatever the program made of it.
    """

    def __init__(self, channel: Channel, entry_point: str):
        super().__init__({"__name__": "__main__"})
        self._channel, self._entry_point = channel, entry_point

    def __missing__(self, name: str) -> Any:
        if name != self._entry_point and hasattr(builtins, name):
            return getattr(builtins, name)
        found = self._channel.ask("find", name)
        if not found:
            raise KeyError(name)
        if isinstance(found[0], types.ModuleType) and name in sys.stdlib_module_names:
            found = [importlib.import_module(name)]
        return self.setdefault(name, found[0])


def judge(channel: Channel, solution: str, tests: str, entry_point: str) -> str:
    """Why the solution fails the tests, or nothing."""
    try:
        code = compile(tests, "tests.py", "exec")
        names = NamesOfTests(channel, entry_point)
        if "SOLUTION" in tests:
            names["SOLUTION"] = Solution(channel, solution)
        else:
            Solution(channel, solution).load()
        exec(code, names)
    except ProgramStopped as error:
        return str(error)
    except BaseException as error:
        try:
            return f"{type(error).__name__}: {error}".rstrip(": ")
        except BaseException:
            return type(error).__name__
    return channel.ended


def main(role: str, reading: int, writing: int, folder: str, libraries: list[str], limits: dict[str, Any]) -> None:
    """
    In a fresh interpreter, as `program`, `judge` or `probe` (which only says that it is confined). The judge reads
    its task from standard input and writes [reason] to standard output.
    """
    task = json.load(sys.stdin) if role == "judge" else {}
    verdict, nothing = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    if role == "program":
        os.close(verdict)
    confine(folder, readable=libraries, **limits)
    sys.path += libraries
    sys.dont_write_bytecode = True
    site.setquit()  # `exit()`, which the flag -S leaves out
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)
    if role == "program":
        sys.setrecursionlimit(10_000)
        refuse_outside(folder)
        Channel(reading, writing, Program().operations(), is_judge=False).serve()
    elif role == "judge":
        reason = judge(Channel(reading, writing, {"call": _call_of_tests}, is_judge=True), **task)
        os.write(verdict, json.dumps([reason[:_LONGEST_REASON]]).encode())
    else:
        os.write(verdict, b"confined")
    os._exit(0)
