"""Reading a pickle without running anything that it names.

Python's own unpickler imports and calls what a pickle asks for. This one never imports: every name is a `Named`, and
calling one gives a `LeftOut`, which accepts state and items and drops them, unless the caller passed a maker for the
name. Lengths are checked against the file before anything is allocated, keys are plain values (Python hashes deeply
nested tuples without a check of its stack), and the number of operations has a limit, so that a crafted pickle ends in
an exception.
"""

import abc
import dataclasses
import io
import pickletools
from collections.abc import Callable, Mapping
from pickle import UnpicklingError
from typing import Any

# An operation is a byte or more and makes an object of up to 64; a state dict takes about 30 for each tensor.
MOST_OPERATIONS = 2_000_000
_LONGEST_NAME = 120
# A pickle may name one content many times, and each time a maker may copy it: in all so often the file's size.
_MOST_TIMES, _LEAST_HANDED = 4, 1 << 16

Makers = Mapping[str, Callable[..., Any]]
Persistent = Callable[[Any], Any]


class TooLarge(ValueError):
    """More than any file of weights holds."""


@dataclasses.dataclass(frozen=True)
class Named:
    """A class or function that a pickle names; it is neither imported nor called."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """Stands where an object of the class or function `name` would be; it keeps nothing of it."""

    name: str

    def __str__(self) -> str:
        return self.name


class Pending(abc.ABC):
    """What a maker returns for a tensor or array: its parts, checked and put together when the pickle was read."""

    @abc.abstractmethod
    def made(self) -> Any:
        """The value. Raises `ValueError`, `TypeError` or `RuntimeError` where the parts do not fit together."""

    def set_state(self, state: Any) -> None:
        """Take the state that the pickle gives after the object was made."""
        raise UnpicklingError("it sets the state of what has none")


class Source:
    """An open file for `read_pickle`, which asks for no more bytes than are left in it."""

    def __init__(self, file: io.BufferedIOBase, size: int) -> None:
        self.readline = file.readline
        self._file = file
        self.size = size

    def read(self, count: int) -> bytes:
        """The next `count` bytes. Raises `EOFError` where the file has fewer."""
        # Only large counts are compared: the file's own position costs more than reading one byte.
        is_large = count > 1024 and count > self.size - self._file.tell()
        content = b"" if is_large else self._file.read(count)
        if len(content) < count:
            raise EOFError("it ends early")
        return content


def read_pickle(source: Source, makers: Makers, persistent: Persistent) -> Any:
    """The value of the pickle at the position of `source`, which is left behind the pickle's end.

    Args:
        source: the file, or a part of one.
        makers: what is called for a name; every other name gives a `LeftOut`.
        persistent: gives the object for a persistent id.

    Raises:
        UnpicklingError, ValueError, IndexError, TypeError, EOFError: not a sound pickle.
        TooLarge: more than `MOST_OPERATIONS`, or makers are handed the same contents again and again.
    """
    machine = _Machine(makers, persistent, most_handed=_MOST_TIMES * source.size + _LEAST_HANDED)
    stream: Any = source  # genops asks for read and readline alone
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if count > MOST_OPERATIONS:
            raise TooLarge(
                f"it holds more than {MOST_OPERATIONS:,} values, far more than a network's weights have"
            )
        if opcode.name == "STOP":
            return machine.stack.pop()
        machine.run(opcode, argument)
    raise EOFError("it ends early")


_WITHOUT_EFFECT = frozenset(("PROTO", "FRAME", "READONLY_BUFFER"))
_FIXED = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_OF_ARGUMENT = frozenset(
    (
        *("INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT"),
        *(
            "STRING",
            "BINSTRING",
            "SHORT_BINSTRING",
            "UNICODE",
            "BINUNICODE",
            "SHORT_BINUNICODE",
            "BINUNICODE8",
        ),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    )
)
# How objects of a class are made, which is the first argument
_INSTANCE_OF_FIRST = (
    *(
        "copyreg._reconstructor",
        "copy_reg._reconstructor",
        "copyreg.__newobj__",
        "copyreg.__newobj_ex__",
    ),
)


class _Machine:
    """The stack, the marks in it and the memo of a pickle that is being read."""

    def __init__(self, makers: Makers, persistent: Persistent, *, most_handed: int) -> None:
        self.left_to_hand = most_handed
        self.makers = makers
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each mark, innermost last
        self.memo: dict[int, Any] = {}

    def run(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        """Do one operation."""
        name = opcode.name
        if name in _OF_ARGUMENT:
            self.stack.append(argument)
        elif name in _FIXED:
            self.stack.append(_FIXED[name])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name == "MARK":
            self.marked.append(self.stack)
            self.stack = []
        elif name in ("POP", "POP_MARK"):
            self.pop(name)
        elif name not in _WITHOUT_EFFECT:
            operands = self.take(opcode.stack_before)
            self.stack.append(self.contained(name, argument, operands))

    def pop(self, name: str) -> None:
        """Drop a value, or a mark with all above it; `POP` means the mark where nothing is above it."""
        if name == "POP" and self.stack:
            self.stack.pop()
        else:
            self.stack = self.marked.pop()

    def take(self, before: list[pickletools.StackObject]) -> list[Any]:
        """Remove what an operation works on, `before` it: so many values, and everything above a mark if it has one."""
        count, above = len(before), []
        if pickletools.markobject in before:
            count = before.index(pickletools.markobject)
            above, self.stack = self.stack, self.marked.pop()
        start = len(self.stack) - count
        if start < 0:
            raise UnpicklingError("its stack is empty")
        taken = self.stack[start:] + above
        del self.stack[start:]
        return taken

    def contained(self, operation: str, argument: Any, operands: list[Any]) -> Any:
        """What an operation leaves on the stack, if it is a container. Sets are lists: nothing has to be hashed."""
        match operation, operands:
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3" | "TUPLE", _:
                return tuple(operands)
            case "EMPTY_LIST" | "LIST" | "EMPTY_SET" | "FROZENSET", _:
                return operands
            case "EMPTY_DICT" | "DICT", _:
                return set_items({}, operands)
            case "SETITEM" | "SETITEMS", [target, *items]:
                return set_items(target, items)
            case "APPEND" | "APPENDS" | "ADDITEMS", [list(target), *items]:
                target.extend(items)
                return target
            case "APPEND" | "APPENDS" | "ADDITEMS", [LeftOut() as target, *_]:
                return target
        return self.named(operation, argument, operands)

    def named(self, operation: str, argument: Any, operands: list[Any]) -> Any:
        """What an operation leaves on the stack, if it names that."""
        match operation, operands:
            case "GET" | "BINGET" | "LONG_BINGET", _:
                return self.memo[argument]
            case "GLOBAL", _:
                return _named(*argument.split(" ", 1))
            case "STACK_GLOBAL", [str(module), str(name)]:
                return _named(module, name)
            case "PERSID", _:
                return self.persistent(argument)
            case "BINPERSID", [reference]:
                return self.persistent(reference)
            case "DUP", [value]:
                self.stack.append(value)
                return value
        return self.object(operation, argument, operands)

    def object(self, operation: str, argument: Any, operands: list[Any]) -> Any:
        """What an operation leaves on the stack, if it makes an object or gives it its state."""
        match operation, operands:
            case "REDUCE" | "NEWOBJ" | "NEWOBJ_EX", [
                function,
                arguments,
                *_,
            ]:  # no maker takes keywords
                return self.call(function, arguments)
            case "OBJ", [function, *arguments]:
                return self.call(function, tuple(arguments))
            case "INST", arguments:
                return self.call(_named(*argument.split(" ", 1)), tuple(arguments))
            case "BUILD", [Pending() as target, state]:
                self.hand(state)
                target.set_state(state)
                return target
            case "BUILD", [
                LeftOut() | dict() as target,
                _,
            ]:  # such as _metadata, an attribute of a state dict
                return target
        raise UnpicklingError(f"it uses {operation} as no file of weights does")

    def call(self, function: Any, arguments: Any) -> Any:
        """What a maker gives; a `LeftOut` where there is none for this function."""
        if isinstance(function, LeftOut):  # such as a bound method that getattr would have given
            return function
        if not isinstance(function, Named) or not isinstance(arguments, tuple):
            raise UnpicklingError("it calls what is no function")
        if function.name in _INSTANCE_OF_FIRST and arguments and isinstance(arguments[0], Named):
            return LeftOut(arguments[0].name)
        maker = self.makers.get(function.name)
        if maker is None:
            return LeftOut(function.name)
        self.hand(arguments)
        return maker(*arguments)

    def hand(self, contents: Any) -> None:
        """Count what a maker may copy."""
        for part in contents if isinstance(contents, tuple) else ():
            if isinstance(part, str | bytes | bytearray | list | tuple):
                self.left_to_hand -= len(part)
        if self.left_to_hand < 0:
            raise TooLarge("it has the same contents again and again")


def _named(module: str, name: str) -> Named:
    text = f"{module}.{name}"[:_LONGEST_NAME]
    return Named("".join(character if character.isprintable() else "?" for character in text))


def set_items(target: Any, items: list[Any]) -> Any:
    """A dict with more keys and values, which take turns in `items`. Raises `UnpicklingError`: no dict, or no keys."""
    if isinstance(target, LeftOut):
        return target
    if not isinstance(target, dict) or len(items) % 2:
        raise UnpicklingError("it sets items of what has none")
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[_checked_key(key)] = value
    return target


def _checked_key(key: Any) -> Any:
    # Only keys whose hash needs no deep recursion, and numbers as text: anyone can choose thousands of equal hash,
    # which a dict compares with each other.
    if key is None or isinstance(key, str | bool | bytes | Named | LeftOut):
        return key
    if isinstance(key, int | float):
        return str(key)
    if isinstance(key, tuple) and all(
        part is None or isinstance(part, str | int | float) for part in key
    ):
        return str(key)
    raise UnpicklingError(f"it has a {type(key).__name__} as a key")
