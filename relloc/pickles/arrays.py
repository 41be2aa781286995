"""Makers of numpy's arrays and scalars for `inert.read_pickle`: their bytes are looked at only when all parts fit."""

import math
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

from relloc.pickles.inert import LeftOut, Makers, Pending

# Numbers that torch has, too; objects, text, dates and records are left out.
_KINDS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
_ORDERS = "<>=|"


class _Kind(Pending):
    """A numpy.dtype: its code, such as f4, and the order of its bytes."""

    def __init__(self, code: Any, *_flags: Any) -> None:
        self.code = code.lstrip(_ORDERS) if isinstance(code, str) else ""
        self.order = code[0] if isinstance(code, str) and code[:1] in tuple(_ORDERS) else "="

    def set_state(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in tuple(_ORDERS):
            raise UnpicklingError("it has a numpy.dtype of an unknown form")
        self.order = state[1]

    def made(self) -> LeftOut:
        return LeftOut("numpy.dtype")

    def numpy(self) -> np.dtype | None:
        """numpy's own; None where it is none of `_KINDS`."""
        return np.dtype(self.order.replace("|", "=") + self.code) if self.code in _KINDS else None


class _Array(Pending):
    """A numpy.ndarray, whose contents come as its state."""

    def __init__(self, *_arguments: Any) -> None:
        self._parts: tuple[Any, ...] = ()

    def set_state(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) not in (4, 5):
            raise UnpicklingError("it has a numpy.ndarray of an unknown form")
        self._parts = state[
            -4:
        ]  # shape, dtype, whether in Fortran's order, bytes; before them may be a version

    def made(self) -> torch.Tensor | LeftOut:
        if not self._parts:
            raise UnpicklingError("it has a numpy.ndarray without contents")
        shape, kind, fortran, content = self._parts
        dtype = kind.numpy() if isinstance(kind, _Kind) else None
        if dtype is None:
            return LeftOut("numpy.ndarray")
        array = _from_bytes(content, dtype, shape, "F" if fortran else "C")
        return torch.from_numpy(array.astype(dtype.newbyteorder("="), order="C"))


def _from_bytes(content: Any, dtype: np.dtype, shape: Any, order: Any) -> np.ndarray:
    if isinstance(content, str):  # as Python 2 wrote it
        content = content.encode("latin-1")
    whole = isinstance(shape, tuple) and all(type(side) is int and side >= 0 for side in shape)
    if not whole or not isinstance(content, bytes | bytearray) or order not in ("C", "F"):
        raise UnpicklingError("it has a numpy.ndarray of an unknown form")
    if math.prod(shape) * dtype.itemsize != len(content):
        raise UnpicklingError(f"it has an array of shape {list(shape)[:8]} in {len(content)} bytes")
    if not content:
        return np.empty(shape, dtype)
    return np.frombuffer(content, dtype).reshape(shape, order=order)


def _buffer(content: Any = None, kind: Any = None, shape: Any = None, order: Any = "C") -> _Array:
    made = _Array()
    made.set_state((shape, kind, order == "F", content))
    return made


def _scalar(kind: Any = None, content: Any = None) -> Any:
    dtype = kind.numpy() if isinstance(kind, _Kind) else None
    if dtype is None or content is None:
        return LeftOut("numpy.generic")
    return _from_bytes(content, dtype, (), "C").item()


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
