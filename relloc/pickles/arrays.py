"""Makers of numpy's arrays and scalars for `inert.read_pickle`.

Shape, type and number of bytes are checked before the bytes are used.
"""

import math
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

from relloc.pickles.inert import LeftOut, Makers, Pending

# Types of numbers that torch has too. Arrays of objects, text, dates and records are left out.
_KINDS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
_ORDERS = "<>=|"  # numpy's signs for the order of bytes: little, big, native, not applicable


class _Kind(Pending):
    """A numpy.dtype in a pickle: its code, such as f4, and the order of its bytes."""

    def __init__(self, code: Any, *_flags: Any) -> None:
        self.code = ""
        self.order = "="
        if isinstance(code, str):
            self.code = code.lstrip(_ORDERS)
            if code[:1] in tuple(_ORDERS):
                self.order = code[0]

    def set_state(self, state: Any) -> None:
        # The state is (version, order of bytes, and more that only other types need).
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in tuple(_ORDERS):
            raise UnpicklingError("it has a numpy.dtype of an unknown form")
        self.order = state[1]

    def made(self) -> LeftOut:
        return LeftOut("numpy.dtype")

    def numpy(self) -> np.dtype | None:
        """Return numpy's own dtype, or None if it is none of `_KINDS`."""
        if self.code not in _KINDS:
            return None
        order = self.order.replace("|", "=")
        return np.dtype(order + self.code)


class _Array(Pending):
    """A numpy.ndarray; a pickle first makes it empty, and then sets its contents as its state."""

    def __init__(self, *_arguments: Any) -> None:
        self._parts: tuple[Any, ...] = ()

    def set_state(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) not in (4, 5):
            raise UnpicklingError("it has a numpy.ndarray of an unknown form")
        # Shape, dtype, whether in Fortran's order, and bytes; a version may stand before them.
        self._parts = state[-4:]

    def made(self) -> torch.Tensor | LeftOut:
        if not self._parts:
            raise UnpicklingError("it has a numpy.ndarray without contents")
        shape, kind, fortran, content = self._parts
        dtype = kind.numpy() if isinstance(kind, _Kind) else None
        if dtype is None:
            return LeftOut("numpy.ndarray")
        array = _from_bytes(content, dtype, shape, "F" if fortran else "C")
        # torch takes only the machine's own order of bytes. The copy is also writable.
        native = array.astype(dtype.newbyteorder("="), order="C")
        return torch.from_numpy(native)


def _from_bytes(content: Any, dtype: np.dtype, shape: Any, order: Any) -> np.ndarray:
    """Return the array of a pickle's parts, which may be anything, after checking that they fit.

    Raises:
        UnpicklingError: a part has the wrong type, or the shape does not fit the number of bytes.
    """
    # Python 2 wrote bytes as text.
    if isinstance(content, str):
        content = content.encode("latin-1")
    has_shape = isinstance(shape, tuple) and all(type(side) is int and side >= 0 for side in shape)
    has_content = isinstance(content, bytes | bytearray)
    if not has_shape or not has_content or order not in ("C", "F"):
        raise UnpicklingError("it has a numpy.ndarray of an unknown form")
    if math.prod(shape) * dtype.itemsize != len(content):
        raise UnpicklingError(f"it has an array of shape {list(shape)[:8]} in {len(content)} bytes")
    # numpy.frombuffer refuses to make an array without elements.
    if not content:
        return np.empty(shape, dtype)
    return np.frombuffer(content, dtype).reshape(shape, order=order)


def _buffer(content: Any = None, kind: Any = None, shape: Any = None, order: Any = "C") -> _Array:
    """Return the array of numpy's own function for protocol 5, which takes all parts at once."""
    made = _Array()
    made.set_state((shape, kind, order == "F", content))
    return made


def _scalar(kind: Any = None, content: Any = None) -> Any:
    """Return a numpy scalar as a Python number."""
    dtype = kind.numpy() if isinstance(kind, _Kind) else None
    if dtype is None or content is None:
        return LeftOut("numpy.generic")
    return _from_bytes(content, dtype, (), "C").item()


# numpy 2 renamed its package core to _core; files have either name.
ARRAYS: Makers = {
    "numpy.dtype": _Kind,
    **{
        f"numpy.{core}.{name}": maker
        for core in ("core", "_core")
        for name, maker in (
            ("multiarray._reconstruct", _Array),
            ("multiarray.scalar", _scalar),
            ("numeric._frombuffer", _buffer),
        )
    },
}
