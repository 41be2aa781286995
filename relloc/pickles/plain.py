"""Makers of containers and plain values for `inert.read_pickle`.

Older pickle protocols have no operations for some of these, and call a function instead.
"""

from typing import Any

from relloc.pickles.inert import LeftOut, Makers, set_items


def _ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    keys_and_values: list[Any] = []
    for key, value in pairs:
        keys_and_values += (key, value)
    return set_items({}, keys_and_values)


def _encode(text: Any, encoding: Any = "") -> Any:
    # This is how Python 3 writes bytes for Python 2. Other codecs are refused; some decompress.
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        return LeftOut("_codecs.encode")
    return text.encode("latin-1")


def _listed(items: Any = ()) -> Any:
    return items if isinstance(items, list | tuple) else []


def _no_bytes(*content: Any) -> Any:
    # Protocol 2 writes empty bytes as a call without arguments.
    return LeftOut("bytes") if content else b""


PLAIN: Makers = {
    "__builtin__.bytes": _no_bytes,
    # Sets are lists here: nothing in them has to be hashed.
    **dict.fromkeys(
        ("__builtin__.set", "__builtin__.frozenset", "builtins.set", "builtins.frozenset"), _listed
    ),
    "collections.OrderedDict": _ordered_dict,
    "collections.defaultdict": lambda *_: {},  # its items follow
    "_codecs.encode": _encode,
}
