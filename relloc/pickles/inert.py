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

    def left(self) -> int:
        """How many bytes follow."""
        return self.size - self._file.tell()

    def read(self, count: int) -> bytes:
        """The next `count` bytes. Raises `EOFError` where the file has fewer."""
        # Only large counts are compared: the file's own position costs more than reading one byte.
        if count > 1024 and count > self.left():
            raise EOFError("it ends early")
        content = self._file.read(count)
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
            raise TooLarge(f"it holds more than {MOST_OPERATIONS:,} values, far more than a network's weights have")
        if opcode.name == "STOP":
            return machine.pop()
        _OPERATIONS[opcode.name](machine, argument)
    raise EOFError("it ends early")


class _Machine:
    """The stack, the marks in it and the memo of a pickle that is being read."""

    def __init__(self, makers: Makers, persistent: Persistent, *, most_handed: int) -> None:
        self.left_to_hand = most_handed
        self.makers = makers
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each mark, innermost last
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        return self.stack.pop()

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop_mark(self) -> list[Any]:
        """Everything above the last mark, which is removed."""
        items = self.stack
        self.stack = self.marked.pop()
        return items

    def call(self, function: Any, arguments: Any) -> Any:
        if isinstance(function, LeftOut):  # such as a bound method that getattr would have given
            return function
        if not isinstance(function, Named) or not isinstance(arguments, tuple):
            raise UnpicklingError("it calls what is no function")
        name = function.name
        if name in _INSTANCE_OF_FIRST and arguments and isinstance(arguments[0], Named):
            return LeftOut(arguments[0].name)
        maker = self.makers.get(name)
        if maker is None:
            return LeftOut(name)
        self.hand(arguments)
        return maker(*arguments)

    def hand(self, contents: Any) -> None:
        """Count what a maker may copy."""
        sized = contents if isinstance(contents, tuple) else ()
        self.left_to_hand -= sum(
            len(part) for part in sized if isinstance(part, str | bytes | bytearray | list | tuple)
        )
        if self.left_to_hand < 0:
            raise TooLarge("it has the same contents again and again")


# How objects of a class are made, which is the first argument
_INSTANCE_OF_FIRST = (
    *("copyreg._reconstructor", "copy_reg._reconstructor", "copyreg.__newobj__", "copyreg.__newobj_ex__"),
)


def _named(module: str, name: str) -> Named:
    text = f"{module}.{name}"[:_LONGEST_NAME]
    return Named("".join(character if character.isprintable() else "?" for character in text))


def set_items(target: Any, items: list[Any]) -> None:
    """Put keys and values, which take turns in `items`, into a dict. Raises `UnpicklingError`: no dict, or no keys."""
    if isinstance(target, LeftOut):
        return
    if not isinstance(target, dict) or len(items) % 2:
        raise UnpicklingError("it sets items of what has none")
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[_checked_key(key)] = value


def _checked_key(key: Any) -> Any:
    # Only keys whose hash needs no deep recursion, and numbers as text: anyone can choose thousands of equal hash,
    # which a dict compares with each other.
    if key is None or isinstance(key, str | bool | bytes | Named | LeftOut):
        return key
    if isinstance(key, int | float):
        return str(key)
    if isinstance(key, tuple) and all(part is None or isinstance(part, str | int | float) for part in key):
        return str(key)
    raise UnpicklingError(f"it has a {type(key).__name__} as a key")


def _extend(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, LeftOut):
        raise UnpicklingError("it appends to what is no list")


def _build(machine: _Machine, _: Any) -> None:
    state, target = machine.pop(), machine.stack[-1]
    if isinstance(target, Pending):
        machine.hand(state)
        target.set_state(state)
    elif not isinstance(target, LeftOut | dict):  # a dict's attributes, such as _metadata of a state dict, are dropped
        raise UnpicklingError("it sets the state of what has none")


def _set_item(machine: _Machine, _: Any) -> None:
    value, key = machine.pop(), machine.pop()
    set_items(machine.stack[-1], [key, value])


def _many_items(machine: _Machine, _: Any) -> None:
    items = machine.pop_mark()
    set_items(machine.stack[-1], items)


def _append(machine: _Machine, _: Any) -> None:
    item = machine.pop()
    _extend(machine.stack[-1], [item])


def _many_appended(machine: _Machine, _: Any) -> None:
    items = machine.pop_mark()
    _extend(machine.stack[-1], items)


def _dict_of_marked(machine: _Machine, _: Any) -> None:
    made: dict[Any, Any] = {}
    set_items(made, machine.pop_mark())
    machine.push(made)


def _tuple_of(count: int) -> Callable[[_Machine, Any], None]:
    def operation(machine: _Machine, _: Any) -> None:
        if len(machine.stack) < count:
            raise UnpicklingError("its stack is empty")
        items = tuple(machine.stack[-count:])
        del machine.stack[-count:]
        machine.push(items)

    return operation


def _mark(machine: _Machine, _: Any) -> None:
    machine.marked.append(machine.stack)
    machine.stack = []


def _pop(machine: _Machine, _: Any) -> None:
    if machine.stack:
        machine.pop()
    else:
        machine.pop_mark()


def _drop_marked(machine: _Machine, _: Any) -> None:
    machine.pop_mark()


def _stack_global(machine: _Machine, _: Any) -> None:
    name, module = machine.pop(), machine.pop()
    if not isinstance(module, str) or not isinstance(name, str):
        raise UnpicklingError("it names a class by what is no text")
    machine.push(_named(module, name))


def _reduce(machine: _Machine, _: Any) -> None:
    arguments, function = machine.pop(), machine.pop()
    machine.push(machine.call(function, arguments))


def _new_object_with_keywords(machine: _Machine, _: Any) -> None:
    machine.pop()  # no maker takes keywords
    arguments, function = machine.pop(), machine.pop()
    machine.push(machine.call(function, arguments))


def _instance(machine: _Machine, argument: str) -> None:
    arguments = tuple(machine.pop_mark())
    machine.push(machine.call(_named(*argument.split(" ", 1)), arguments))


def _object(machine: _Machine, _: Any) -> None:
    function, *arguments = machine.pop_mark()
    machine.push(machine.call(function, tuple(arguments)))


def _memoize(machine: _Machine, argument: int | None) -> None:
    machine.memo[len(machine.memo) if argument is None else argument] = machine.stack[-1]


def _refused(machine: _Machine, _: Any) -> None:
    raise UnpicklingError("it refers to something outside the file")


def _push_argument(machine: _Machine, argument: Any) -> None:
    machine.push(argument)


def _nothing(machine: _Machine, _: Any) -> None: ...


_OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME", "READONLY_BUFFER"), _nothing),
    **dict.fromkeys(("INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2"), _push_argument),
    **dict.fromkeys(("FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING"), _push_argument),
    **dict.fromkeys(("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), _push_argument),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"), _push_argument),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_mark())),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "LIST": lambda machine, _: machine.push(machine.pop_mark()),
    "APPEND": _append,
    "APPENDS": _many_appended,
    "EMPTY_SET": lambda machine, _: machine.push([]),
    "ADDITEMS": _many_appended,
    "FROZENSET": lambda machine, _: machine.push(machine.pop_mark()),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "DICT": _dict_of_marked,
    "SETITEM": _set_item,
    "SETITEMS": _many_items,
    "MARK": _mark,
    "POP": _pop,
    "POP_MARK": _drop_marked,
    "DUP": lambda machine, _: machine.push(machine.stack[-1]),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _memoize),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda machine, argument: machine.push(machine.memo[argument])),
    "GLOBAL": lambda machine, argument: machine.push(_named(*argument.split(" ", 1))),
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _reduce,
    "NEWOBJ": _reduce,
    "NEWOBJ_EX": _new_object_with_keywords,
    "INST": _instance,
    "OBJ": _object,
    "BUILD": _build,
    "BINPERSID": lambda machine, _: machine.push(machine.persistent(machine.pop())),
    "PERSID": lambda machine, argument: machine.push(machine.persistent(argument)),
    **dict.fromkeys(("EXT1", "EXT2", "EXT4", "NEXT_BUFFER"), _refused),
}
