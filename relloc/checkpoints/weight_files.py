"""Reads files of weights from any project, without running code that may be in them."""

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
from relloc.files import path_as_text
from relloc.pickles import torch_files
from relloc.pickles.inert import MOST_OPERATIONS, LeftOut, Named, Pending, TooLarge
from relloc.pickles.torch_files import OtherKind

_PICKLE = b"\x80"  # the first byte of pickles since protocol 2
_TAR_MAGIC, _TAR_MAGIC_AT = b"ustar", 257  # what a tar has at this offset
# Bytes of a safetensors header. The library allows 100 MB, from which it makes gigabytes of
# objects; a thousand tensors need 0.1 MB.
_SAFETENSORS_MOST_HEADER = 1 << 24
_KINDS = "neither safetensors, nor written by torch.save, nor a pickle of numpy arrays"
# First bytes of files that can't be read, and what to do with such a file.
_OTHER_KINDS = {
    b"version https://git-lfs": "a Git LFS pointer: fetch the file with git lfs pull",
    b"\x89HDF": "HDF5, as Keras and TensorFlow write it: convert it to a state_dict, "
    "and save that with torch.save",
    b"\x93NUMPY": "one numpy array, without names: save a state_dict with torch.save",
    b"\x1f\x8b": "compressed by gzip: unpack it",
    b"\xfd7zXZ": "compressed by xz: unpack it",
    b"BZh": "compressed by bzip2: unpack it",
}
_DEEPEST = 100  # nested containers


def read(file: Path, *, expected: str = "file of weights") -> dict[str, Any]:
    """Returns the content of a file of weights, nested as it was saved, with tensors on the CPU.

    The format is recognized by the first bytes: safetensors; what torch.save wrote, as a zip or as
    one stream; and pickles of tensors or numpy arrays, such as detectron2's converters write.
    Nothing in a file is run. An object of a class, such as notes of a training, is replaced by a
    `LeftOut` with the name of its class. numpy arrays become tensors. The checksums in zips are
    compared.

    Example: `read(Path("moco_v2_800ep.pth.tar"))["state_dict"]`

    Args:
        file: the file.
        expected: what the file should be, for the message about a damaged one.

    Raises:
        DamagedCheckpoint: damaged, of another kind, or with objects of classes and nothing else.
        CheckpointError: nothing is there, or it can't be read.
    """
    content = _content(file, expected)
    # Notes of a training beside the tensors are harmless, but a whole pickled model has no tensors
    # that could be read.
    kinds = {type(value) for _, value in leaves(content)}
    if LeftOut in kinds and Tensor not in kinds:
        raise DamagedCheckpoint(
            f"{file} holds more than tensors and plain values: {_main_object(content)}, "
            "which can't be loaded without running code. Save the model's state_dict() alone, "
            "best as safetensors, with the project that wrote it"
        )
    if not isinstance(content, dict):
        raise DamagedCheckpoint(
            f"{file} holds a {type(content).__name__}, not weights by their names"
        )
    return content


def names_at_top(file: Path, *, expected: str = "file of weights") -> set[str]:
    """Returns the names at the top level of a file, without reading its tensors.

    Raises:
        CheckpointError: as `read`.
    """
    content = _content(file, expected, numbers=False)
    if not isinstance(content, Mapping):
        return set()
    return {name for name in content if isinstance(name, str)}


def _content(file: Path, expected: str, *, numbers: bool = True) -> Any:
    """Returns what a file holds; without `numbers` its tensors are not read and stay unfinished."""
    start, size = _first_bytes(file)
    try:
        # Warnings of the libraries are ignored: a file that is refused gives one message, the
        # error.
        with warnings.catch_warnings(action="ignore"):
            read_file = _reader(start, size)
            content = read_file(file, numbers)
            return _Unfolding().plain(content) if numbers else content
    except OtherKind as error:
        raise DamagedCheckpoint(f"{file} {error}") from error
    except BROKEN as error:
        raise DamagedCheckpoint(f"{file} is damaged or no {expected}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """Returns the reason of a reader's error in one short line."""
    if isinstance(error, MemoryError):
        return "what it declares does not fit into memory"
    without_text = "it ends early" if isinstance(error, EOFError) else type(error).__name__
    first_line = str(error).partition("\n")[0][:300] or without_text
    # The texts of these tell of Python's internals and mean nothing to a user.
    if isinstance(error, KeyError | IndexError | TypeError | AttributeError | struct.error):
        return f"its parts do not fit together ({first_line})"
    return first_line


def _first_bytes(file: Path) -> tuple[bytes, int]:
    """Returns the first 512 bytes of a file, and its size in bytes."""
    try:
        file_stat = file.stat()
        mode = file_stat.st_mode
        # Opening a pipe would block. For a folder the system's own error is clear enough.
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise CheckpointError(f"{file} is no regular file: give a file of weights")
        with open(file, "rb") as opened:
            return opened.read(512), file_stat.st_size
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{file} does not exist: "
            "give a file of weights, or the run folder of a finished pretraining"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{file} can't be read ({error.strerror})") from error


def _reader(start: bytes, size: int) -> Callable[[Path, bool], Any]:
    """Returns the function that reads a file of `size` bytes that begins with `start`.

    Raises:
        OtherKind, ValueError: the file is of a kind that can't be read; the message goes on after
            "it".
    """
    # A safetensors file begins with the length of its header (8 bytes) and then the header's brace.
    # It is tried first, since the length may look like the beginning of a pickle.
    header = int.from_bytes(start[:8], "little")
    has_brace = start[8:9] == b"{"
    if has_brace and 8 + header <= size:
        return _from_safetensors
    if start.startswith(torch_files.ZIP_START):
        return torch_files.read_zip
    if start.startswith(torch_files.LEGACY_START):
        return torch_files.read_legacy
    # A safetensors file that was cut off within its header; the library will say so.
    if has_brace and header <= _SAFETENSORS_MOST_HEADER:
        return _from_safetensors
    if start.startswith(_PICKLE):
        return lambda file, _numbers: torch_files.read_bare(file)
    if start[_TAR_MAGIC_AT:].startswith(_TAR_MAGIC):
        raise OtherKind(
            "is a tar. If it is an archive of files, unpack it. torch.save before version 0.1.10 "
            "also wrote tars: load such a file with torch in the project that wrote it, "
            "and save the model's state_dict() again with torch.save"
        )
    for first_bytes, description in _OTHER_KINDS.items():
        if start.startswith(first_bytes):
            raise ValueError(f"it is {description}")
    if not start:
        raise ValueError("it is empty")
    raise ValueError(f"it is {_KINDS}")


def opened_safetensors(file: Path) -> Any:
    """Returns an open safetensors file, as `safetensors.safe_open` gives it.

    Raises:
        FileNotFoundError: it is no regular file.
        TooLarge: its header is larger than that of any network.
        SafetensorError, OSError: it is damaged, or can't be read.
    """
    # Opening a pipe would block.
    if not file.is_file():
        raise FileNotFoundError(errno.ENOENT, "it is no regular file", str(file))
    with open(file, "rb") as begun:
        header = int.from_bytes(begun.read(8), "little")
        if header > _SAFETENSORS_MOST_HEADER:
            raise TooLarge(f"its header has {header:,} bytes, far more than that of a network")
        # The library takes only paths that are UTF-8; this one names the open file itself. The
        # library maps the file into memory at once, so that it may be closed afterwards.
        is_utf8 = path_as_text(file) == str(file)
        return safe_open(file if is_utf8 else f"/dev/fd/{begun.fileno()}", framework="pt")


def _from_safetensors(file: Path, numbers: bool) -> dict[str, Any]:
    with opened_safetensors(file) as opened:
        names = opened.keys()
        if not numbers:
            return dict.fromkeys(names)
        return {name: opened.get_tensor(name) for name in names}


class _Unfolding:
    """Turns what a reader returned into plain values, with limits on depth and number.

    A hostile file can have containers that hold each other, which would be unfolded without end.
    """

    def __init__(self) -> None:
        self._n_values = 0
        # A file may refer to one tensor many times; it is made once.
        self._made: dict[Pending, Any] = {}

    def plain(self, value: Any, depth: int = 0) -> Any:
        """Returns dicts with text as keys, lists, tuples, tensors, `LeftOut` and plain values."""
        self._n_values += 1
        if depth > _DEEPEST:
            raise TooLarge(f"it is nested more than {_DEEPEST} deep")
        if self._n_values > MOST_OPERATIONS:
            raise TooLarge(f"it unfolds to more than {MOST_OPERATIONS:,} values")
        if isinstance(value, Pending):
            if value not in self._made:
                self._made[value] = value.made()
            return self._made[value]
        if isinstance(value, Mapping):
            return {_text(key): self.plain(inner, depth + 1) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.plain(inner, depth + 1) for inner in value)
        if isinstance(value, Named):
            return LeftOut(value.name)
        return value


def _text(key: Any) -> str:
    """Returns a key as text that can be printed; Python 2 wrote names as bytes."""
    text = key.decode("latin-1") if isinstance(key, bytes) else str(key)
    return text if text.isprintable() else ascii(text)[1:-1]


def leaves(content: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields all values in nested containers with their dotted names.

    Example: `{"model": {"fc": [1, 2]}}` yields ("model.fc.0", 1) and ("model.fc.1", 2).
    """
    # The items of lists are named by their positions.
    if isinstance(content, list | tuple):
        content = dict(enumerate(content))
    if not isinstance(content, Mapping):
        yield name.removesuffix("."), content
        return
    for key, value in content.items():
        yield from leaves(value, f"{name}{key}.")


def _main_object(content: Any) -> LeftOut:
    """Returns the object to name in the message about a file that holds objects instead of tensors.

    That is the model, if it has one of the usual names, or else the first object.
    """
    left_out = {name: value for name, value in leaves(content) if isinstance(value, LeftOut)}
    for usual_name in ("model", "state_dict", "net", "module", "ema"):
        if usual_name in left_out:
            return left_out[usual_name]
    return next(iter(left_out.values()))
