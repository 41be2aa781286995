"""Reading files of weights, of any project, without running what may be in them."""

import codecs
import pickle
import re
import struct
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy._core import multiarray, numeric
from safetensors import SafetensorError, safe_open

from relloc.errors import CheckpointError, DamagedCheckpoint

_TORCH_ZIP = b"PK\x03\x04"
_TORCH_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number, pickled
_PICKLE = b"\x80"
_LFS_POINTER = b"version https://git-lfs"
_KINDS = "neither safetensors, nor written by torch.save, nor a pickle of numpy arrays"
_BROKEN = (
    *(OSError, RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError),
    *(MemoryError, OverflowError, AssertionError, ImportError, struct.error),
)


class _LeftOut:
    """Stands where a file has notes of its training that need a class of its project; it keeps nothing."""

    def __init__(self, *_arguments: object) -> None: ...

    def __setstate__(self, _state: object) -> None: ...


def _from_buffer(*arguments: Any) -> np.ndarray:
    # One of our own, so that no file can change numpy's.
    return numeric._frombuffer(*arguments)  # pyright: ignore[reportAttributeAccessIssue]


# What projects save beside their weights; getattr is how HistoryBuffer's methods are pickled, and here it does nothing.
_NOTES = ("mmengine.logging.history_buffer.HistoryBuffer", "argparse.Namespace", "builtins.getattr")
_NUMPY: dict[str, Any] = {
    **{f"numpy.{core}.multiarray.{name}": getattr(multiarray, name) for core in ("core", "_core")
       for name in ("_reconstruct", "scalar")},
    **{f"numpy.{core}.numeric._frombuffer": _from_buffer for core in ("core", "_core")},
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
}  # fmt: skip
_PLAIN: dict[str, Any] = {
    **_NUMPY,
    "collections.OrderedDict": OrderedDict,
    "_codecs.encode": codecs.encode,  # how Python 3 writes bytes for Python 2
}


def read(file: Path) -> dict[str, Any]:
    """What is in a file of weights, nested as it was saved, on the CPU; numpy arrays become tensors.

    Known by their first bytes: safetensors; what torch.save wrote (torch.load with weights_only,
    which besides tensors and plain values admits numpy arrays here, and drops the notes that
    mmengine and argparse leave); and bare pickles, such as detectron2's converters write. Those
    torch.load can't read: an unpickler does that admits numpy arrays and plain containers, and
    calls nothing else.

    Raises:
        CheckpointError: nothing there, damaged, nothing of this kind, or it holds more than that.
    """
    content = _content(file)
    if not isinstance(content, Mapping):
        raise DamagedCheckpoint(f"{file} holds a {type(content).__name__}, not weights by their names")
    return _with_tensors(content)


def _content(file: Path) -> Any:
    start = _first_bytes(file)
    try:
        if start.startswith((_TORCH_ZIP, _TORCH_LEGACY)):
            return _from_torch(file)
        if start.startswith(_PICKLE):
            return _from_pickle(file)
        if start[8:9] == b"{":
            return _from_safetensors(file)
    except pickle.UnpicklingError as error:  # torch's own message advises to run the code in the file
        raise _refused(file, str(error)) from error
    except (*_BROKEN, SafetensorError) as error:
        first_line = str(error).partition("\n")[0]
        raise DamagedCheckpoint(f"{file} is damaged or no file of weights: {first_line or 'it ends early'}") from error
    raise DamagedCheckpoint(f"{file} is damaged or no file of weights: it is {_what(start)}")


def _first_bytes(file: Path) -> bytes:
    try:
        with open(file, "rb") as opened:
            return opened.read(64)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{file} does not exist: give a file of weights, or the run folder of a finished pretraining"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{file} can't be read ({error.strerror})") from error


def _what(start: bytes) -> str:
    if not start:
        return "empty"
    return "a Git LFS pointer: fetch the file with git lfs pull" if start.startswith(_LFS_POINTER) else _KINDS


def _refused(file: Path, reason: str) -> DamagedCheckpoint:
    named = re.search(r"GLOBAL (\S+)", reason)
    if named:
        return DamagedCheckpoint(
            f"{file} holds more than tensors and plain values: {named[1]}, which would be code to run. "
            "Save the model's state_dict() alone, best as safetensors, with the project that wrote it"
        )
    return DamagedCheckpoint(f"{file} is damaged or no file of weights: its pickle can't be read")


def _from_torch(file: Path) -> Any:
    kinds = [kind for kind in vars(np.dtypes).values() if isinstance(kind, type)]
    notes = [(_LeftOut, name) for name in _NOTES]
    with torch.serialization.safe_globals([*kinds, *notes, *((made, name) for name, made in _NUMPY.items())]):
        return torch.load(file, map_location="cpu", weights_only=True)


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        full_name = f"{module}.{name}"
        if full_name not in _PLAIN:
            raise pickle.UnpicklingError(f"GLOBAL {full_name}")
        return _PLAIN[full_name]

    def persistent_load(self, pid: Any, /) -> Any:
        raise pickle.UnpicklingError(f"a reference to something outside: {pid}")


def _from_pickle(file: Path) -> Any:
    opened: IO[bytes]
    with open(file, "rb") as opened:
        return _PlainUnpickler(opened, encoding="latin1").load()  # latin1: also what Python 2 wrote


def _from_safetensors(file: Path) -> dict[str, Any]:
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping


def _with_tensors(content: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(name): _with_tensor(value) for name, value in content.items()}


def _with_tensor(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _with_tensors(value)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(value.astype(value.dtype.newbyteorder("="), order="C"))
    return value
