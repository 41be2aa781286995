"""Reads a pickle without running anything that it names.

A pickle is a program for a small stack machine, and Python's own unpickler imports and calls
whatever the program asks for. This reader never imports. Each name of a class or function becomes a
`Named`, and calling one gives a `LeftOut`, unless the caller passed a maker (a safe function) for
that name.

A crafted pickle must end in an exception and exhaust neither memory nor time. So lengths are
checked against the size of the file before anything is allocated; keys of dicts are plain values,
since Python hashes deeply nested tuples without checking its stack; and the number of operations is
limited.
"""

import abc
import dataclasses
import io
import pickletools
from collections.abc import Callable, Mapping
from pickle import UnpicklingError
from typing import Any

# An operation takes a byte or more and makes an object of up to 64 bytes. A state dict needs about
# 30 operations for each tensor.
MOST_OPERATIONS = 2_000_000
_LONGEST_NAME = 120  # characters of a class's name that are kept
# A pickle may hand one content to makers many times, and each may copy it. All contents together
# may be so many times the size of the file, or this number of bytes for small files.
_MOST_TIMES, _LEAST_HANDED = 4, 1 << 16

Makers = Mapping[str, Callable[..., Any]]
Persistent = Callable[[Any], Any]


class TooLarge(ValueError):
    """A file declares more than any file of weights holds, which may exhaust memory or time."""


@dataclasses.dataclass(frozen=True)
class Named:
    """The name of a class or function in a pickle; it is neither imported nor called."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """Replaces an object that the class or function `name` would have made, and keeps only that."""

    name: str

    def __str__(self) -> str:
        return self.name


class Pending(abc.ABC):
    """A tensor or array whose parts were read, to be checked and put together by `made`.

    That happens after the whole pickle was read, when the contents of tensors are known as well.
    """

    @abc.abstractmethod
    def made(self) -> Any:
        """Return the finished value.

        Raises:
            ValueError, TypeError, RuntimeError: the parts do not fit together.
        """

    def set_state(self, state: Any) -> None:
        """Take the state that the pickle sets after the object was made."""
        raise UnpicklingError("it sets the state of an object that has none")


class Source:
    """An open file of known size for `read_pickle`, which never allocates more than is left in it.

    Args:
        file: the file, open for reading.
        size: how many bytes it has in all.
    """

    def __init__(self, file: io.BufferedIOBase, size: int) -> None:
        self.readline = file.readline
        self._file = file
        self.size = size

    def read(self, count: int) -> bytes:
        """Return the next `count` bytes.

        Raises:
            EOFError: the file has fewer.
        """
        # Small counts are not compared, since asking for the position costs more than reading a
        # byte.
        is_too_large = count > 1024 and count > self.size - self._file.tell()
        content = b"" if is_too_large else self._file.read(count)
        if len(content) < count:
            raise EOFError("it ends early")
        return content


def read_pickle(source: Source, makers: Makers, persistent: Persistent) -> Any:
    """Read one pickle from the current position of `source`, and stop right after its end.

    Args:
        source: the file, or a part of one.
        makers: the functions that may be called, by the name that the pickle has for them; calling
            any other name gives a `LeftOut`.
        persistent: returns the object for a persistent id, by which a pickle refers to things
            outside of it, such as torch's storages.

    Raises:
        UnpicklingError, ValueError, IndexError, TypeError, EOFError: it is damaged or no pickle.
        TooLarge: it has more than `MOST_OPERATIONS`, or hands the same contents to makers
            repeatedly.
    """
    machine = _Machine(makers, persistent, most_handed=_MOST_TIMES * source.size + _LEAST_HANDED)
    # genops only decodes the operations and their arguments; it needs read and readline of a file.
    stream: Any = source
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if count > MOST_OPERATIONS:
            raise TooLarge(
                f"it holds more than {MOST_OPERATIONS:,} values, "
                "far more than the weights of a network have"
            )
        if opcode.name == "STOP":
            return machine.stack.pop()
        machine.run(opcode, argument)
    raise EOFError("it ends early")


# Groups of operations, by pickletools' names for them.
_WITHOUT_EFFECT = frozenset(("PROTO", "FRAME", "READONLY_BUFFER"))
_FIXED = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
# Operations that put their own argument onto the stack.
_PUSH_ARGUMENT = frozenset(
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
# Functions that make an object of the class that is their first argument.
_INSTANCE_OF_FIRST = (
    *(
        "copyreg._reconstructor",
        "copy_reg._reconstructor",
        "copyreg.__newobj__",
        "copyreg.__newobj_ex__",
    ),
)


class _Machine:
    """The stack machine that runs a pickle's operations: its stack, its marks and its memo.

    A mark is a position in the stack; some operations take everything above the latest mark. The
    memo holds values that the pickle refers to again. See the Python module pickletools.
    """

    def __init__(self, makers: Makers, persistent: Persistent, *, most_handed: int) -> None:
        self.left_to_hand = most_handed
        self.makers = makers
        self.persistent = persistent
        self.stack: list[Any] = []
        # The part of the stack below each mark, the latest mark last; `stack` is what is above it.
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        """Run one operation."""
        name = opcode.name
        if name in _PUSH_ARGUMENT:
            self.stack.append(argument)
        elif name in _FIXED:
            self.stack.append(_FIXED[name])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        # A mark sets the stack so far aside, and starts an empty one above it.
        elif name == "MARK":
            self.marked.append(self.stack)
            self.stack = []
        elif name in ("POP", "POP_MARK"):
            self.pop(name)
        elif name not in _WITHOUT_EFFECT:
            operands = self.take(opcode.stack_before)
            self.stack.append(self.contained(name, argument, operands))

    def pop(self, name: str) -> None:
        """Drop a value, or the latest mark with all above it.

        `POP` drops a mark if nothing is above it, as in Python's own unpickler.
        """
        if name == "POP" and self.stack:
            self.stack.pop()
        else:
            self.stack = self.marked.pop()

    def take(self, before: list[pickletools.StackObject]) -> list[Any]:
        """Remove the operands of an operation from the stack and return them.

        `before` describes them: a number of values, and perhaps a mark with everything above it.
        """
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
        """Return the result of an operation that makes or fills a container, or else of others.

        Sets become lists, so that nothing in them has to be hashed.
        """
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
            # Objects that are left out drop their items.
            case "APPEND" | "APPENDS" | "ADDITEMS", [LeftOut() as target, *_]:
                return target
        return self.named(operation, argument, operands)

    def named(self, operation: str, argument: Any, operands: list[Any]) -> Any:
        """Return the result of an operation that names or repeats a value, or else of others."""
        match operation, operands:
            # Values that were stored in the memo before.
            case "GET" | "BINGET" | "LONG_BINGET", _:
                return self.memo[argument]
            case "GLOBAL", _:
                return _named(*argument.split(" ", 1))
            case "STACK_GLOBAL", [str(module), str(name)]:
                return _named(module, name)
            # References to things outside of the pickle.
            case "PERSID", _:
                return self.persistent(argument)
            case "BINPERSID", [reference]:
                return self.persistent(reference)
            case "DUP", [value]:
                self.stack.append(value)
                return value
        return self.object(operation, argument, operands)

    def object(self, operation: str, argument: Any, operands: list[Any]) -> Any:
        """Return the result of an operation that makes an object or sets its state."""
        match operation, operands:
            # What follows are keyword arguments, which no maker takes.
            case "REDUCE" | "NEWOBJ" | "NEWOBJ_EX", [function, arguments, *_]:
                return self.call(function, arguments)
            case "OBJ", [function, *arguments]:
                return self.call(function, tuple(arguments))
            case "INST", arguments:
                return self.call(_named(*argument.split(" ", 1)), tuple(arguments))
            case "BUILD", [Pending() as target, state]:
                self.hand(state)
                target.set_state(state)
                return target
            # The state is dropped, such as _metadata, an attribute of state dicts.
            case "BUILD", [LeftOut() | dict() as target, _]:
                return target
        raise UnpicklingError(f"it uses the operation {operation} as no file of weights does")

    def call(self, function: Any, arguments: Any) -> Any:
        """Return what the maker for `function` returns, or a `LeftOut` if there is none."""
        # For example the bound method that a call of getattr would have returned.
        if isinstance(function, LeftOut):
            return function
        if not isinstance(function, Named) or not isinstance(arguments, tuple):
            raise UnpicklingError("it calls something that is no function")
        # The class says more in a message than the function that makes objects of any class.
        if function.name in _INSTANCE_OF_FIRST and arguments and isinstance(arguments[0], Named):
            return LeftOut(arguments[0].name)
        maker = self.makers.get(function.name)
        if maker is None:
            return LeftOut(function.name)
        self.hand(arguments)
        return maker(*arguments)

    def hand(self, contents: Any) -> None:
        """Count the contents that a maker may copy, and refuse too many.

        Raises:
            TooLarge: more than `most_handed` in all.
        """
        for part in contents if isinstance(contents, tuple) else ():
            if isinstance(part, str | bytes | bytearray | list | tuple):
                self.left_to_hand -= len(part)
        if self.left_to_hand < 0:
            raise TooLarge("it has the same contents again and again")


def _named(module: str, name: str) -> Named:
    """Return the name of a class or function, short and printable."""
    text = f"{module}.{name}"[:_LONGEST_NAME]
    printable = [character if character.isprintable() else "?" for character in text]
    return Named("".join(printable))


def set_items(target: Any, items: list[Any]) -> Any:
    """Add keys and values, which alternate in `items`, to a dict, and return the dict.

    Raises:
        UnpicklingError: `target` is no dict, or a key has no value, or can't be a key.
    """
    if isinstance(target, LeftOut):
        return target
    if not isinstance(target, dict) or len(items) % 2:
        raise UnpicklingError("it sets items of an object that has none")
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[_checked_key(key)] = value
    return target


def _checked_key(key: Any) -> Any:
    """Return a key that is safe to hash. Numbers, and tuples of plain values, become text.

    Anyone can choose thousands of numbers with equal hashes, which a dict would compare with each
    other; hashes of text can't be predicted.
    """
    if key is None or isinstance(key, str | bool | bytes | Named | LeftOut):
        return key
    if isinstance(key, int | float):
        return str(key)
    # Tuples of tuples are refused: hashing them recurses, and Python does not check its stack
    # there.
    if isinstance(key, tuple):
        is_plain = [part is None or isinstance(part, str | int | float) for part in key]
        if all(is_plain):
            return str(key)
    raise UnpicklingError(f"it has a {type(key).__name__} as a key")
