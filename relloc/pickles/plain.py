"""Makers of containers and plain values for `inert.read_pickle`, which older protocols have only as calls."""

from typing import Any

from relloc.pickles.inert import LeftOut, Makers, set_items


def _ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    return set_items({}, [part for key, value in pairs for part in (key, value)])


def _encode(text: Any, encoding: Any = "") -> Any:
    # How Python 3 writes bytes for Python 2; other codecs could decompress.
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        return LeftOut("_codecs.encode")
    return text.encode("latin-1")


def _listed(items: Any = ()) -> Any:
    return items if isinstance(items, list | tuple) else []


def _no_bytes(*content: Any) -> Any:
    return LeftOut("bytes") if content else b""  # protocol 2 has no other word for none


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
