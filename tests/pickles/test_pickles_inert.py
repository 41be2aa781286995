"""The interpreter of pickles against Python's own, and what it never does."""

import builtins
import collections
import datetime
import enum
import functools
import io
import pathlib
import pickle
import struct
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relloc.pickles.inert import LeftOut, Named, Source, TooLarge, read_pickle
from relloc.pickles.plain import PLAIN

KEYS = (
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False) | st.binary()
)
LEAVES = KEYS | st.floats(allow_nan=False)
PLAIN_VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(KEYS, inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(), inner).map(collections.OrderedDict)
    ),
    max_leaves=30,
)


def read(content: bytes) -> Any:
    def refuse(reference: Any) -> Any:
        raise pickle.UnpicklingError(f"{reference}")

    return read_pickle(Source(io.BytesIO(content), len(content)), PLAIN, refuse)


@given(PLAIN_VALUES, st.sampled_from([2, 3, 4, 5]))
def test_plain_values_are_those_that_pythons_unpickler_gives(value: Any, protocol: int) -> None:
    content = pickle.dumps(value, protocol)
    found = read(content)
    assert found == _numbers_as_text(pickle.loads(content))
    assert _kinds(found) == _kinds(_numbers_as_text(value))


def _numbers_as_text(value: Any) -> Any:
    """With text for the numbers among keys."""
    if isinstance(value, dict):
        number = (int, float)
        named = ((str(key) if type(key) in number else key, inner) for key, inner in value.items())
        return {key: _numbers_as_text(inner) for key, inner in named}
    if isinstance(value, list | tuple):
        return type(value)(map(_numbers_as_text, value))
    return value


def test_keys_of_equal_hash_are_not_compared_with_each_other() -> None:
    keys = [number * (2**61 - 1) for number in range(1, 40_000)]  # as numbers they take minutes
    content = pickle.dumps([value for key in keys for value in (key, None)], 2)
    as_dict = content.replace(b"]q\x00", b"}q\x00").replace(b"e(", b"u(").replace(b"e.", b"u.")
    assert list(read(as_dict)) == [str(key) for key in keys]


def _kinds(value: Any) -> Any:
    """The types of all values within; an ordered dict is a dict."""
    if isinstance(value, dict):
        return "dict", [_kinds(inner) for inner in value.values()]
    if isinstance(value, list | tuple):
        return type(value), [_kinds(inner) for inner in value]
    return type(value)


def test_shared_and_long_values_come_back() -> None:
    shared = [1] * 3000
    value = {
        "a": shared,
        "b": shared,
        "long": "x" * 300_000,
        "bytes": bytes(70_000),
        "large": 1 << 5000,
    }
    for protocol in (2, 4):
        found = read(pickle.dumps(value, protocol))
        assert found == value
        assert found["a"] is found["b"]


class Colors(enum.Enum):
    RED = 1


class Note:
    """With state, slots of others, and items that a subclass of dict has."""

    def __init__(self) -> None:
        self.inner = {"path": pathlib.PurePosixPath("/x")}


class Items(dict):
    pass


class Entries(list):
    pass


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (pathlib.PurePosixPath("/data"), "pathlib.PurePosixPath"),
        (datetime.datetime(2024, 1, 2), "datetime.datetime"),
        (functools.partial(int, base=2), "functools.partial"),
        (Note(), f"{__name__}.Note"),
        (Items(a=1), f"{__name__}.Items"),
        (Entries([1, 2]), f"{__name__}.Entries"),
        pytest.param(
            *(Colors.RED, f"{__name__}.Colors"),
            marks=pytest.mark.skipif(
                sys.version_info < (3, 11, 4), reason="pickled as an attribute of its class"
            ),
        ),
        (collections.Counter("aab"), "collections.Counter"),
    ],
)
def test_objects_of_classes_are_stand_ins_with_their_names(
    value: Any, name: str, protocol: int
) -> None:
    found = read(pickle.dumps({"note": value, "after": 1}, protocol))
    assert found == {"note": LeftOut(name), "after": 1}


def test_nothing_is_imported_or_called(monkeypatch: pytest.MonkeyPatch) -> None:
    content = (
        b"\x80\x02}(U\x01aca_module_that_is_not_there\nf\nU\x01bcbuiltins\neval\nU\x031/0\x85Ru."
    )

    def refused(name: str, *_arguments: Any, **_named: Any) -> Any:
        raise AssertionError(name)

    monkeypatch.setattr(builtins, "__import__", refused)
    found = read(content)
    monkeypatch.undo()
    assert found == {"a": Named("a_module_that_is_not_there.f"), "b": LeftOut("builtins.eval")}


def test_sets_are_lists_and_default_dicts_are_dicts() -> None:
    value = {
        "set": {1, 2},
        "frozen": frozenset("a"),
        "default": collections.defaultdict(list, a=[1]),
    }
    assert read(pickle.dumps(value, 4)) == {"set": [1, 2], "frozen": ["a"], "default": {"a": [1]}}


def test_names_in_a_file_can_not_write_on_a_terminal() -> None:
    found = read(b"\x80\x04\x8c\x01\x1b\x8c\x04a\nb\x07\x93.")
    assert found.name.isprintable()
    assert len(read(b"\x80\x02c" + b"a" * 5000 + b"\nb\n.").name) < 200


DEEP_TUPLE = b")" + b"\x85" * 100_000  # whose hash would overflow the interpreter's stack


@pytest.mark.parametrize(
    "content",
    [
        b"}r\xff\xff\xff\xff0",
        b"}\x8b\xff\xff\xff\x7f",
        b"}\x8e" + struct.pack("<Q", 2**60) + b"a",
        b"}\x96" + struct.pack("<Q", 2**60) + b"a",
        b"}" + DEEP_TUPLE + b"Ns.",
        b"}]Ns.",
        b"}NQ.",
        b"}Px\n.",
        b"\x82\x01.",
        b"\x97.",
        b"NNR.",
        b"N}b.",
        b"cbuiltins\nlist\n}U\x01aNsb.",
        b"\x85.",
        b"a.",
        b"K\x01K\x02a.",
        b"K\x01K\x02K\x03s.",
        b"}(K\x01u.",
        b"h\x00.",
        b"t.",
        b"NN\x93.",
        b"",
        b"}",
    ],
)
def test_what_is_no_sound_pickle_is_one_exception(content: bytes) -> None:
    with pytest.raises((pickle.UnpicklingError, ValueError, IndexError, KeyError, EOFError)):
        read(b"\x80\x02" + content)


def test_one_content_that_is_handed_to_makers_again_and_again_is_refused() -> None:
    once = (
        b"\x80\x02]U\x01ac_codecs\nencode\nq\x01X"
        + struct.pack("<I", 1 << 16)
        + b"a" * (1 << 16)
        + b"q\x02"
    )
    text = once.replace(b"]U\x01a", b"](", 1) + b"U\x06latin1\x86R"
    again = b"h\x01h\x02U\x06latin1\x86R"
    assert len(read(text + again + b"e.")) == 2
    with pytest.raises(TooLarge):
        read(text + again * 1000 + b"e.")


def test_more_values_than_weights_have_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relloc.pickles.inert.MOST_OPERATIONS", 1000)
    with pytest.raises(TooLarge):
        read(b"\x80\x02" + b"]" * 2000 + b".")
