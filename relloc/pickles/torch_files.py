"""Reads what torch.save wrote, without torch's own unpickler.

torch.save writes a zip since torch 1.6 and wrote one stream before. torch.load with weights_only
refuses a whole file because of one note that needs a class, and its reader of zips ignores
checksums. Here such notes are left out by name, each record's CRC is compared, and no size that a
file declares is believed before the file was seen to have it.
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
from relloc.terminal import quantity

ZIP_START = b"PK\x03\x04"
LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number, pickled
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
# Limits against zips that unpack to far more than their size. torch stores without compression, and
# weights that someone compressed shrink by less than half. Small files may unpack to a mebibyte.
_MOST_EXPANSION, _LEAST_SIZE = 8, 1 << 20
# torch's names of classes of storages, such as torch.cuda.FloatStorage.
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
# Classes of tensors that are read as plain tensors.
_PLAIN_TYPES = (
    "torch.Tensor",
    "torch._tensor.Tensor",
    "torch.nn.parameter.Parameter",
    "torch.nn.parameter.Buffer",
)
_SAVE_AGAIN = "save the model's state_dict() with torch.save"


class OtherKind(ValueError):
    """A file of a kind that is not read, such as a TorchScript file.

    The message continues a sentence that begins with the file's name, and says what to do.
    """


@dataclasses.dataclass
class _Storage:
    """The bytes of one or more tensors; `content` is None until they are read."""

    itemsize: int
    content: bytearray | None = None


@dataclasses.dataclass
class _Stored:
    """A part of a storage: `count` numbers of one type, beginning with number `start`."""

    storage: _Storage
    dtype: torch.dtype
    start: int
    count: int


@dataclasses.dataclass(eq=False)
class _Tensor(Pending):
    """A tensor whose storage is still to be read: which of its numbers it has, in which order.

    Offset, size and stride are what the file says, and may be anything.
    """

    stored: _Stored
    offset: Any
    size: tuple[Any, ...]
    stride: tuple[Any, ...]
    dtype: torch.dtype

    def made(self) -> torch.Tensor:
        """Return the tensor as a view of its storage.

        Raises:
            UnpicklingError: its shape is impossible, or needs more numbers than the storage has.
        """
        stored, content = self.stored, self.stored.storage.content
        if not _are_counts((*self.size, *self.stride, self.offset)) or content is None:
            raise UnpicklingError("it has a tensor of an impossible shape, or without numbers")
        # The bytes that this tensor may use. torch checks that its shape and strides stay within
        # them.
        start = stored.start * stored.dtype.itemsize
        end = start + stored.count * stored.dtype.itemsize
        own = memoryview(content)[start:end]
        try:
            # torch.frombuffer refuses to make a tensor without numbers.
            flat = torch.empty(0, dtype=self.dtype)
            if own:
                flat = torch.frombuffer(own, dtype=self.dtype)
            # An empty tensor may have any offset in the file, which torch would refuse.
            offset = 0 if 0 in self.size else self.offset
            tensor = flat.as_strided(self.size, self.stride, offset)
        except (ValueError, TypeError, RuntimeError) as error:
            raise UnpicklingError("it has fewer numbers than its tensors") from error
        if end > len(content):
            raise UnpicklingError("it has fewer numbers than its tensors")
        return tensor


def _are_counts(numbers: Iterable[Any]) -> bool:
    """Return whether all are whole numbers and none is negative."""
    return all(type(number) is int and number >= 0 for number in numbers)


def _tensor(
    stored: Any, offset: Any, size: Any, stride: Any, *_more: Any, dtype: Any = None
) -> Any:
    """Return the `Pending` tensor of a call of torch._utils._rebuild_tensor (or _v2)."""
    match stored, size, stride:
        case LeftOut(), _, _:
            return stored
        case _Stored(), [*sides], [*steps]:
            return _Tensor(stored, offset, tuple(sides), tuple(steps), dtype or stored.dtype)
    raise UnpicklingError("it has a tensor of an unknown form")


def _tensor_of_type(*arguments: Any) -> Any:
    """Return a tensor of the third version, which names a type that its storage may not have."""
    match arguments:
        case _stored, _offset, _size, _stride, _requires_grad, _hooks, Named(kind), *_:
            dtype = vars(torch).get(kind.removeprefix("torch."))
            if isinstance(dtype, torch.dtype):
                return _tensor(*arguments, dtype=dtype)
    return LeftOut("torch.Tensor")


def _parameter(tensor: Any, *_more: Any) -> Any:
    return tensor


def _tensor_of_class(maker: Any, kind: Any, arguments: Any, *_state: Any) -> Any:
    """Return a tensor that has attributes of its own, which are dropped.

    One of a derived class is left out, since its numbers may mean something else.
    """
    match maker, kind:
        case Named(name), Named(class_name) if name in _TENSORS and class_name in _PLAIN_TYPES:
            return _TENSORS[name](*arguments)
        case _, Named(class_name):
            return LeftOut(class_name)
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
    "torch._tensor._rebuild_from_type_v2": _tensor_of_class,
    "torch.Size": lambda sides=(): sides,
}


class _Storages:
    """Collects the storages that a pickle refers to, by their keys.

    The pickle has only the references; the bytes are elsewhere in the file, and are read
    afterwards.
    """

    def __init__(self) -> None:
        self.by_key: dict[str, _Storage] = {}

    def __call__(self, reference: Any) -> Any:
        """Return what a persistent id refers to.

        That is a part of a storage, or in old files the class of a module.
        """
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
        # Old files may refer to a part of a storage, by a key of its own, its start and its length.
        if view and view[0] is not None:
            _key, start, count = view[0]
        if not isinstance(key, str) or not _are_counts([start, count]):
            raise UnpicklingError("it has a storage of an unknown form")
        storage = self.by_key.setdefault(key, _Storage(dtype.itemsize))
        return _Stored(storage, dtype, start, count)


def read_zip(file: Path, numbers: bool = True) -> Any:
    """Read what torch.save wrote as a zip: plain values, and `Pending` ones for tensors and arrays.

    Args:
        file: the file.
        numbers: whether to read the tensors' bytes; otherwise the tensors can't be made.

    Raises:
        OtherKind: it is a zip of another kind.
        TooLarge: its records would take far more space than the file.
        zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError: it is damaged. The errors
            of `read_pickle` mean the same.
    """
    with zipfile.ZipFile(file) as archive:
        records = {record.filename: record for record in archive.infolist()}
        root = _root(records)
        _check_records(archive.infolist(), file.stat().st_size)
        # After torch.serialization.set_crc32_options(False) torch writes zeros for all checksums;
        # for zipfile None means to compare none.
        if not any(record.CRC for record in records.values()):
            for record in records.values():
                record.CRC = None  # pyright: ignore[reportAttributeAccessIssue]
        if f"{root}/byteorder" in records and _record(archive, f"{root}/byteorder") != b"little":
            raise OtherKind(
                "was saved on a machine with another order of bytes: "
                f"load it there and {_SAVE_AGAIN}"
            )
        # The pickle is read as a whole, so that its CRC is compared before anything in it is
        # believed.
        pickled = _record(archive, f"{root}/data.pkl")
        storages = _Storages()
        source = Source(io.BytesIO(pickled), len(pickled))
        content = read_pickle(source, _MAKERS, storages)
        if numbers:
            for key, storage in storages.by_key.items():
                storage.content = bytearray(_record(archive, f"{root}/data/{key}"))
    return content


def _record(archive: zipfile.ZipFile, name: str) -> bytes:
    """Return a record's bytes after comparing its CRC.

    No more is read than the record declares: a hostile one may unpack to more.
    """
    with archive.open(name) as opened:
        return opened.read(archive.getinfo(name).file_size)


def _root(records: Mapping[str, zipfile.ZipInfo]) -> str:
    """Return the folder within the zip that holds all records.

    Raises:
        OtherKind: it is a TorchScript file, or torch.save did not write it.
    """
    inner_names = {name.partition("/")[2] for name in records}
    has_program = any(name.startswith("code/") for name in inner_names)
    if has_program or {"constants.pkl", "model.json", "bytecode.pkl"} & inner_names:
        raise OtherKind(
            "is a TorchScript file, which holds a program beside its weights: "
            f"load it with torch.jit.load in the project that wrote it, and {_SAVE_AGAIN}"
        )
    roots = [
        name.removesuffix("/data.pkl") for name in records if re.fullmatch(r"[^/]+/data\.pkl", name)
    ]
    if len(roots) == 1:
        return roots[0]
    file_names = [name for name in records if not name.endswith("/")]
    first = file_names[0] if file_names else "nothing"
    raise OtherKind(
        "is a zip that torch.save did not write "
        f"(it holds {quantity(len(records), 'file')}, such as {first[:80]!r}): "
        f"give the file of weights itself, or {_SAVE_AGAIN}"
    )


def _check_records(records: Sequence[zipfile.ZipInfo], size: int) -> None:
    """Refuse records that can be read in two ways, or that unpack to far more than `size` bytes."""
    # Programs differ in which of two records of one name they take.
    counts = Counter(record.filename for record in records)
    duplicates = [name for name, count in counts.items() if count > 1]
    if duplicates:
        raise UnpicklingError(f"its record {duplicates[0][:80]!a} is there twice")
    # Python's zipfile unpacks other methods in pieces without a limit on their size.
    methods = {record.compress_type for record in records}
    if not methods <= {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        raise OtherKind(
            f"is a zip packed by another method than torch and zip use: unpack it, or {_SAVE_AGAIN}"
        )
    declared = sum(record.file_size for record in records)
    if declared > max(_LEAST_SIZE, _MOST_EXPANSION * size):
        raise TooLarge(f"its records would fill {declared:,} bytes, the file has {size:,}")


def read_legacy(file: Path, numbers: bool = True) -> Any:
    """Read what torch.save wrote as one stream, before torch 1.6.

    Returns and raises what `read_zip` does; `EOFError` where the file ends early.
    """
    with open(file, "rb") as opened:
        return _stream(Source(opened, file.stat().st_size), numbers)


def _stream(source: Source, numbers: bool = True) -> Any:
    """Read the pickles that follow each other in a stream of torch.save, and then the storages."""
    # Three pickles describe the file: a magic number, the version, and the machine that wrote it.
    magic, protocol, machine = [read_pickle(source, {}, refuse_reference) for _ in range(3)]
    if magic != _MAGIC or protocol != _PROTOCOL or not isinstance(machine, dict):
        raise UnpicklingError("it begins as torch's files do and goes on otherwise")
    if machine.get("little_endian") is False:
        raise OtherKind(
            f"was saved on a machine with another order of bytes: load it there and {_SAVE_AGAIN}"
        )
    # The content has references to storages. The order in which their bytes follow comes next.
    storages = _Storages()
    content = read_pickle(source, _MAKERS, storages)
    if numbers:
        keys = read_pickle(source, {}, refuse_reference)
        known = storages.by_key
        if not isinstance(keys, list) or set(keys) != set(known) or len(keys) > len(known):
            raise UnpicklingError("it lists other storages than its tensors have")
        for key in keys:
            storage = known[key]
            n_numbers = int.from_bytes(source.read(8), "little")
            storage.content = bytearray(source.read(n_numbers * storage.itemsize))
    return content


def read_bare(file: Path) -> Any:
    """Read a pickle of arrays or tensors that was written without torch.save.

    Returns and raises what `read_legacy` does.
    """
    with open(file, "rb") as opened:
        return read_pickle(Source(opened, file.stat().st_size), _BARE_MAKERS, refuse_reference)


def _storage_of_bytes(content: Any) -> Any:
    """Return the storage that a plain pickle holds as the bytes of a stream of torch.save.

    The inner stream is read without this maker, so that there is no recursion.
    """
    if not isinstance(content, bytes):
        raise UnpicklingError("it has a storage of an unknown form")
    stored = _stream(Source(io.BytesIO(content), len(content)))
    return stored if isinstance(stored, _Stored) else LeftOut("torch.storage._load_from_bytes")


_BARE_MAKERS: Makers = {**_MAKERS, "torch.storage._load_from_bytes": _storage_of_bytes}


def refuse_reference(_reference: Any) -> Any:
    """Raise `UnpicklingError`; for pickles that must not have persistent ids."""
    raise UnpicklingError("it refers to something outside the file")
