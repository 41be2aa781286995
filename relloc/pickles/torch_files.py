"""Reading what torch.save wrote, as a zip (since torch 1.6) or one stream (before), without torch's own unpickler.

torch.load with weights_only refuses a file for one note that needs a class, and its reader of zips looks at no
checksum. Here such notes are left out by name, each record's CRC is compared, and no size that a file declares is
believed before the file was seen to have it.
"""

import dataclasses
import io
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from relloc.pickles.arrays import ARRAYS
from relloc.pickles.inert import LeftOut, Makers, Named, Pending, Source, TooLarge, read_pickle
from relloc.pickles.plain import PLAIN

ZIP_START = b"PK\x03\x04"
LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number, pickled
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
# torch stores without compression; weights that someone compressed shrink by less than half.
_MOST_EXPANSION, _LEAST_SIZE = 8, 1 << 20
_STORAGE = re.compile(r"torch\.(?:cuda\.|storage\.)?_?(\w+)Storage")
_DTYPES: Mapping[str, torch.dtype] = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
    "Untyped": torch.uint8,
}
_PLAIN_TYPES = (
    "torch.Tensor",
    "torch._tensor.Tensor",
    "torch.nn.parameter.Parameter",
    "torch.nn.parameter.Buffer",
)
_SAVE_AGAIN = "save the model's state_dict() with torch.save"


class OtherKind(ValueError):
    """A file that torch wrote for another use; the message, which goes on after the file's name, says what to do."""


@dataclasses.dataclass
class _Storage:
    """The bytes of one or more tensors; `content` is None until they are read."""

    itemsize: int
    content: bytearray | None = None


@dataclasses.dataclass
class _Stored:
    """Numbers in a storage: `count` of one type, from the number `start` on."""

    storage: _Storage
    dtype: torch.dtype
    start: int
    count: int


@dataclasses.dataclass(eq=False)
class _Tensor(Pending):
    """A tensor: which numbers of a storage it has, in which order."""

    stored: _Stored
    offset: Any
    size: tuple[Any, ...]
    stride: tuple[Any, ...]
    dtype: torch.dtype

    def made(self) -> torch.Tensor:
        stored, content = self.stored, self.stored.storage.content
        if not _whole((*self.size, *self.stride, self.offset)) or content is None:
            raise UnpicklingError("it has a tensor of an impossible shape, or without numbers")
        # The bytes of the storage that are this tensor's to use; torch compares what its shape needs with them.
        start = stored.start * stored.dtype.itemsize
        end = start + stored.count * stored.dtype.itemsize
        own = memoryview(content)[start:end]
        try:
            flat = (
                torch.frombuffer(own, dtype=self.dtype) if own else torch.empty(0, dtype=self.dtype)
            )
            made = flat.as_strided(self.size, self.stride, 0 if 0 in self.size else self.offset)
        except (ValueError, TypeError, RuntimeError) as error:
            raise UnpicklingError("it has fewer numbers than its tensors") from error
        if end > len(content):
            raise UnpicklingError("it has fewer numbers than its tensors")
        return made


def _whole(numbers: Iterable[Any]) -> bool:
    return all(type(number) is int and number >= 0 for number in numbers)


def _tensor(
    stored: Any, offset: Any, size: Any, stride: Any, *_more: Any, dtype: Any = None
) -> Any:
    match stored, size, stride:
        case LeftOut(), _, _:
            return stored
        case _Stored(), [*sides], [*steps]:
            return _Tensor(stored, offset, tuple(sides), tuple(steps), dtype or stored.dtype)
    raise UnpicklingError("it has a tensor of an unknown form")


def _tensor_of_type(*arguments: Any) -> Any:
    match arguments:
        case _stored, _offset, _size, _stride, _requires_grad, _hooks, Named(kind), *_:
            dtype = vars(torch).get(kind.removeprefix("torch."))
            if isinstance(dtype, torch.dtype):
                return _tensor(*arguments, dtype=dtype)
    return LeftOut("torch.Tensor")


def _parameter(tensor: Any, *_more: Any) -> Any:
    return tensor


def _of_class(maker: Any, kind: Any, arguments: Any, *_state: Any) -> Any:
    """A tensor that has attributes, or of a class that only looks like one and may mean something else."""
    match maker, kind:
        case Named(name), Named(of) if name in _TENSORS and of in _PLAIN_TYPES:
            return _TENSORS[name](*arguments)
        case _, Named(of):
            return LeftOut(of)
    return LeftOut("torch.Tensor")


_TENSORS: Makers = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_type,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
_MAKERS: Makers = {
    **PLAIN,
    **ARRAYS,
    **_TENSORS,
    "torch._tensor._rebuild_from_type_v2": _of_class,
    "torch.Size": lambda sides=(): sides,
}


class _Storages:
    """The storages that a pickle refers to, by their keys."""

    def __init__(self) -> None:
        self.by_key: dict[str, _Storage] = {}

    def __call__(self, reference: Any) -> Any:
        """What a persistent id stands for: a part of a storage, or in old files the class of a module."""
        match reference:
            case ["module" | b"module", Named() as kind, *_]:
                return kind
            case ["storage" | b"storage", Named(name), key, _place, count, *view]:
                found = _STORAGE.fullmatch(name)
                dtype = _DTYPES.get(found[1]) if found else None
            case _:
                return refuse_reference(reference)
        if dtype is None:
            return LeftOut(name)
        start = 0
        if (
            view and view[0] is not None
        ):  # a part of a storage, in old files: its own key, start and length
            _key, start, count = view[0]
        if not isinstance(key, str) or not _whole([start, count]):
            raise UnpicklingError("it has a storage of an unknown form")
        return _Stored(self.by_key.setdefault(key, _Storage(dtype.itemsize)), dtype, start, count)


def read_zip(file: Path, numbers: bool = True) -> Any:
    """What torch.save wrote as a zip: plain values, and `Pending` ones for tensors and arrays.

    Without `numbers` the tensors' bytes are not read, and the tensors can't be made.

    Raises:
        OtherKind: a zip of another kind.
        TooLarge: its records would take far more space than the file.
        zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, and those of `read_pickle`: damaged.
    """
    with zipfile.ZipFile(file) as archive:
        records = {record.filename: record for record in archive.infolist()}
        root = _root(records)
        _check_records(archive.infolist(), file.stat().st_size)
        if not any(
            record.CRC for record in records.values()
        ):  # torch.serialization.set_crc32_options(False)
            for record in records.values():
                record.CRC = None  # pyright: ignore[reportAttributeAccessIssue] - zipfile's way to compare none
        if f"{root}/byteorder" in records and _record(archive, f"{root}/byteorder") != b"little":
            raise OtherKind(
                f"was saved on a machine with another order of bytes: load it there and {_SAVE_AGAIN}"
            )
        storages = _Storages()
        pickled = _record(
            archive, f"{root}/data.pkl"
        )  # whole, so that its CRC is compared before it is believed
        content = read_pickle(Source(io.BytesIO(pickled), len(pickled)), _MAKERS, storages)
        if numbers:
            for key, storage in storages.by_key.items():
                storage.content = bytearray(_record(archive, f"{root}/data/{key}"))
    return content


def _record(archive: zipfile.ZipFile, name: str) -> bytes:
    """A record as long as it declares to be, its CRC compared; reading it whole would unpack more, if there is more."""
    with archive.open(name) as opened:
        return opened.read(archive.getinfo(name).file_size)


def _root(records: Mapping[str, zipfile.ZipInfo]) -> str:
    """The folder in the zip that holds all records."""
    inner = {name.partition("/")[2] for name in records}
    if {"constants.pkl", "model.json", "bytecode.pkl"} & inner or any(
        name.startswith("code/") for name in inner
    ):
        raise OtherKind(
            "is a TorchScript file, which holds a program beside its weights: load it with torch.jit.load in the "
            f"project that wrote it, and {_SAVE_AGAIN}"
        )
    roots = [
        name.removesuffix("/data.pkl") for name in records if re.fullmatch(r"[^/]+/data\.pkl", name)
    ]
    if len(roots) == 1:
        return roots[0]
    first = next((name for name in records if not name.endswith("/")), "nothing")
    raise OtherKind(
        f"is a zip that torch.save did not write (it holds {len(records)} files, such as {first[:80]!r}): give the "
        f"file of weights itself, or {_SAVE_AGAIN}"
    )


def _check_records(records: Sequence[zipfile.ZipInfo], size: int) -> None:
    twice = [
        name for name, count in Counter(record.filename for record in records).items() if count > 1
    ]
    if twice:  # programs differ in which of them they take
        raise UnpicklingError(f"its record {twice[0][:80]!a} is there twice")
    # Others are unpacked by Python's zipfile in pieces that know no limit.
    if any(
        record.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for record in records
    ):
        raise OtherKind(
            f"is a zip packed by another method than torch and zip use: unpack it, or {_SAVE_AGAIN}"
        )
    declared = sum(record.file_size for record in records)
    if declared > max(_LEAST_SIZE, _MOST_EXPANSION * size):
        raise TooLarge(f"its records would fill {declared:,} bytes, the file has {size:,}")


def read_legacy(file: Path, numbers: bool = True) -> Any:
    """What torch.save wrote as one stream, as `read_zip` gives it. Raises as that does, and `EOFError`."""
    with open(file, "rb") as opened:
        return _stream(Source(opened, file.stat().st_size), numbers)


def _stream(source: Source, numbers: bool = True) -> Any:
    storages = _Storages()
    about = [read_pickle(source, {}, refuse_reference) for _ in range(3)]
    if about[:2] != [_MAGIC, _PROTOCOL] or not isinstance(about[2], dict):
        raise UnpicklingError("it begins as torch's files do and goes on otherwise")
    if about[2].get("little_endian") is False:
        raise OtherKind(
            f"was saved on a machine with another order of bytes: load it there and {_SAVE_AGAIN}"
        )
    content = read_pickle(source, _MAKERS, storages)
    if numbers:
        keys = read_pickle(source, {}, refuse_reference)
        if (
            not isinstance(keys, list)
            or set(keys) != set(storages.by_key)
            or len(keys) > len(storages.by_key)
        ):
            raise UnpicklingError("it lists other storages than its tensors have")
        for key in keys:
            storage = storages.by_key[key]
            storage.content = bytearray(
                source.read(int.from_bytes(source.read(8), "little") * storage.itemsize)
            )
    return content


def read_bare(file: Path) -> Any:
    """A pickle that torch had no part in, of arrays or tensors. Raises as `read_legacy`."""
    with open(file, "rb") as opened:
        return read_pickle(Source(opened, file.stat().st_size), _BARE_MAKERS, refuse_reference)


def _storage_of_bytes(content: Any) -> Any:
    """How pickle keeps a storage: a stream of torch's as bytes. None can be within it, so there is no recursion."""
    if not isinstance(content, bytes):
        raise UnpicklingError("it has a storage of an unknown form")
    stored = _stream(Source(io.BytesIO(content), len(content)))
    return stored if isinstance(stored, _Stored) else LeftOut("torch.storage._load_from_bytes")


_BARE_MAKERS: Makers = {**_MAKERS, "torch.storage._load_from_bytes": _storage_of_bytes}


def refuse_reference(_reference: Any) -> Any:
    """For pickles that have no persistent ids."""
    raise UnpicklingError("it refers to something outside the file")
