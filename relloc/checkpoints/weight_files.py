"""Reading files of weights, of any project, without running what may be in them."""

import errno
import stat
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from relloc.checkpoints.hashed_files import BROKEN
from relloc.errors import CheckpointError, DamagedCheckpoint
from relloc.pickles import torch_files
from relloc.pickles.inert import MOST_OPERATIONS, LeftOut, Named, Pending, TooLarge
from relloc.pickles.torch_files import OtherKind

_PICKLE = b"\x80"
_TAR_MAGIC, _TAR_MAGIC_AT = b"ustar", 257
# The library takes 100 MB, of which it makes gigabytes; a thousand tensors need 0.1 MB.
_SAFETENSORS_MOST_HEADER = 1 << 24
_KINDS = "neither safetensors, nor written by torch.save, nor a pickle of numpy arrays"
_OTHERS = {
    b"version https://git-lfs": "a Git LFS pointer: fetch the file with git lfs pull",
    b"\x89HDF": "HDF5, as Keras and TensorFlow write it: convert it to a state_dict and save that with torch.save",
    b"\x93NUMPY": "one numpy array, without names: save a state_dict with torch.save",
    b"\x1f\x8b": "compressed by gzip: unpack it",
    b"\xfd7zXZ": "compressed by xz: unpack it",
    b"BZh": "compressed by bzip2: unpack it",
}
_DEEPEST = 100  # nested containers


def read(file: Path, *, expected: str = "file of weights") -> dict[str, Any]:
    """What is in a file of weights, nested as it was saved, on the CPU; numpy arrays become tensors.

    Known by its first bytes: safetensors; what torch.save wrote, as a zip or as one stream; and bare
    pickles of tensors or of numpy arrays, such as detectron2's converters write. Nothing in them is run: where a
    file has an object of a class, such as notes of its training, a `LeftOut` of its name stands in
    the content. The checksums in zips are compared. `expected` names in messages what a damaged
    file should have been.

    Raises:
        DamagedCheckpoint: damaged, nothing of this kind, or objects of classes and nothing else.
        CheckpointError: nothing there, or it can't be read.
    """
    content = _content(file, expected)
    kinds = {type(value) for _, value in leaves(content)}
    if LeftOut in kinds and Tensor not in kinds:
        raise DamagedCheckpoint(
            f"{file} holds more than tensors and plain values: {_main_object(content)}, which would be code to run. "
            "Save the model's state_dict() alone, best as safetensors, with the project that wrote it"
        )
    if not isinstance(content, dict):
        raise DamagedCheckpoint(
            f"{file} holds a {type(content).__name__}, not weights by their names"
        )
    return content


def names_at_top(file: Path, *, expected: str = "file of weights") -> set[str]:
    """The names at the top of what is in a file; its tensors are not read. Raises as `read`."""
    content = _content(file, expected, numbers=False)
    return (
        {name for name in content if isinstance(name, str)}
        if isinstance(content, Mapping)
        else set()
    )


def _content(file: Path, expected: str, *, numbers: bool = True) -> Any:
    start, size = _first_bytes(file)
    try:
        with warnings.catch_warnings(action="ignore"):  # a refused file is one message
            content = _reader(start, size)(file, numbers)
            return _Unfolding().plain(content) if numbers else content
    except OtherKind as error:
        raise DamagedCheckpoint(f"{file} {error}") from error
    except BROKEN as error:
        raise DamagedCheckpoint(f"{file} is damaged or no {expected}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "what it declares does not fit into memory"
    without_text = "it ends early" if isinstance(error, EOFError) else type(error).__name__
    first_line = str(error).partition("\n")[0][:300] or without_text
    if isinstance(
        error, KeyError | IndexError | TypeError | AttributeError | struct.error
    ):  # of no use to a reader
        return f"its parts do not fit together ({first_line})"
    return first_line


def _first_bytes(file: Path) -> tuple[bytes, int]:
    """The first bytes, and how many there are in all."""
    try:
        about = file.stat()
        if not stat.S_ISREG(about.st_mode) and not stat.S_ISDIR(about.st_mode):
            raise CheckpointError(f"{file} is no regular file: give a file of weights")
        with open(file, "rb") as opened:
            return opened.read(512), about.st_size
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{file} does not exist: give a file of weights, or the run folder of a finished pretraining"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{file} can't be read ({error.strerror})") from error


def _reader(start: bytes, size: int) -> Callable[[Path, bool], Any]:
    """What reads a file that begins with `start`; safetensors first, as their length may look like a pickle."""
    header = int.from_bytes(start[:8], "little")
    has_brace = start[8:9] == b"{"
    if has_brace and 8 + header <= size:
        return _from_safetensors
    if start.startswith(torch_files.ZIP_START):
        return torch_files.read_zip
    if start.startswith(torch_files.LEGACY_START):
        return torch_files.read_legacy
    if has_brace and header <= _SAFETENSORS_MOST_HEADER:  # it ends within its header
        return _from_safetensors
    if start.startswith(_PICKLE):
        return lambda file, _numbers: torch_files.read_bare(file)
    if start[_TAR_MAGIC_AT:].startswith(_TAR_MAGIC):
        raise OtherKind(
            "is a tar, as torch.save wrote before version 0.1.10 and as archives of files are: unpack an archive; "
            "load a file of such an old torch with torch in the project that wrote it, and save the model's "
            "state_dict() again with torch.save"
        )
    known = [told for begins, told in _OTHERS.items() if start.startswith(begins)]
    raise ValueError(f"it is {known[0] if known else _KINDS if start else 'empty'}")


def opened_safetensors(file: Path) -> Any:
    """A file of safetensors, opened as the library does. Raises those of `BROKEN`: damaged, or none."""
    if not file.is_file():  # to open a pipe would wait for ever
        raise FileNotFoundError(errno.ENOENT, "it is no regular file", str(file))
    with open(file, "rb") as begun:
        header = int.from_bytes(begun.read(8), "little")
    if header > _SAFETENSORS_MOST_HEADER:
        raise TooLarge(f"its header is of {header:,} bytes, far more than a network's has")
    return safe_open(file, framework="pt")


def _from_safetensors(file: Path, numbers: bool) -> dict[str, Any]:
    with opened_safetensors(file) as opened:
        return {name: opened.get_tensor(name) if numbers else None for name in opened.keys()}  # noqa: SIM118


class _Unfolding:
    """Turns what a reader gave into plain values; containers that hold each other would be unfolded without end."""

    def __init__(self) -> None:
        self._values = 0
        self._made: dict[Pending, Any] = {}  # a file may name one many times

    def plain(self, value: Any, depth: int = 0) -> Any:
        """Dicts with text as keys, lists, tuples, tensors, `LeftOut` and plain values."""
        self._values += 1
        if depth > _DEEPEST:
            raise TooLarge(f"it is nested more than {_DEEPEST} deep")
        if self._values > MOST_OPERATIONS:
            raise TooLarge(f"it unfolds to more than {MOST_OPERATIONS:,} values")
        if isinstance(value, Pending):
            if value not in self._made:
                self._made[value] = value.made()
            return self._made[value]
        if isinstance(value, Mapping):
            return {_text(key): self.plain(inner, depth + 1) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.plain(inner, depth + 1) for inner in value)
        return LeftOut(value.name) if isinstance(value, Named) else value


def _text(key: Any) -> str:
    text = key.decode("latin-1") if isinstance(key, bytes) else str(key)
    return text if text.isprintable() else ascii(text)[1:-1]


def leaves(content: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """All values in nested containers, by dotted names."""
    if isinstance(content, list | tuple):
        content = dict(enumerate(content))
    if not isinstance(content, Mapping):
        yield name.removesuffix("."), content
        return
    for key, value in content.items():
        yield from leaves(value, f"{name}{key}.")


def _main_object(content: Any) -> LeftOut:
    """The first that was left out of a file without tensors, or the model, if it is there by a usual name."""
    left_out = {name: value for name, value in leaves(content) if isinstance(value, LeftOut)}
    usual = [name for name in ("model", "state_dict", "net", "module", "ema") if name in left_out]
    return left_out[(usual or list(left_out))[0]]
