"""What torch.save wrote, read without torch's unpickler: the same tensors to the bit."""

import io
import pickle
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from relloc.checkpoints.weight_files import read
from relloc.errors import CheckpointError, DamagedCheckpoint
from relloc.pickles.inert import LeftOut


def all_kinds() -> dict[str, Tensor]:
    base = torch.randn(6, 8)
    kinds = [
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
    ]
    return {
        "base": base,
        "view": base[1:5, ::2],
        "transposed": base.T,
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "expanded": torch.randn(3, 1).expand(3, 4),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "parameter": nn.Parameter(torch.randn(3)),
        "bool": torch.tensor([True, False]),
        "complex": torch.tensor([1 + 2j]),
        "last": base.reshape(-1)[-1],
        **{str(kind): torch.tensor([0, 1, 100]).to(kind) for kind in kinds},
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("zipped", [True, False])
def test_all_kinds_of_tensors_are_those_that_torch_loads(tmp_path: Path, zipped: bool) -> None:
    content = OrderedDict(all_kinds())
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    assert_same(read(tmp_path / "x.pth"), torch.load(tmp_path / "x.pth", weights_only=True))
    found = read(tmp_path / "x.pth")
    assert found["base"].untyped_storage().data_ptr() == found["view"].untyped_storage().data_ptr()
    assert not found["parameter"].requires_grad


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_tensors_that_pickle_wrote_without_torch_save_come_back(
    tmp_path: Path, protocol: int
) -> None:
    content = all_kinds()
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content, protocol))
    assert_same(
        read(tmp_path / "x.pkl"), {name: tensor.detach() for name, tensor in content.items()}
    )


def test_types_without_a_storage_class_come_back(tmp_path: Path) -> None:
    content = {
        "float8": torch.tensor([1.5, -2.0]).to(torch.float8_e4m3fn),
        "uint16": torch.tensor([1, 65535]).to(torch.uint16),
    }
    torch.save(content, tmp_path / "x.pth")
    found = read(tmp_path / "x.pth")
    for name, tensor in content.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))


# Newer releases of torch advise against quantized tensors, but files have them.
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_what_only_looks_like_a_tensor_is_left_out(tmp_path: Path) -> None:
    quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    torch.save(
        {"sparse": torch.eye(2).to_sparse(), "quantized": quantized, "plain": torch.ones(1)},
        tmp_path / "x.pth",
    )
    found = read(tmp_path / "x.pth")
    assert isinstance(found["sparse"], LeftOut)
    assert isinstance(found["quantized"], LeftOut)
    assert torch.equal(found["plain"], torch.ones(1))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.save({"a": torch.randn(1000), "b": torch.arange(10)}, tmp_path / "x.pth")
    return tmp_path / "x.pth"


def test_a_turned_byte_is_told_wherever_it_is_in_the_numbers(saved: Path) -> None:
    whole = saved.read_bytes()
    start = whole.index(torch.load(saved, weights_only=True)["a"].numpy().tobytes())
    for place in (start, start + 1999, start + 3999):
        content = bytearray(whole)
        content[place] ^= 1
        saved.write_bytes(content)
        with pytest.raises(DamagedCheckpoint, match="CRC"):
            read(saved)


def test_a_file_that_was_saved_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(3.0)}, tmp_path / "x.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read(tmp_path / "x.pth")["a"], torch.arange(3.0))


def repacked(file: Path, how: int, change: dict[str, bytes] | None = None) -> None:
    """Write a zip anew with another compression, or with other records."""
    out = io.BytesIO()
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(out, "w", how) as new:
        for name in old.namelist():
            new.writestr(name, (change or {}).get(name.partition("/")[2], old.read(name)))
    file.write_bytes(out.getvalue())


def test_a_record_that_unpacks_to_more_than_it_declares_takes_no_memory(saved: Path) -> None:
    with zipfile.ZipFile(saved) as old:
        declared = old.getinfo(
            next(name for name in old.namelist() if name.endswith("data/0"))
        ).file_size
    repacked(saved, zipfile.ZIP_DEFLATED, {"data/0": bytes(1 << 27)})
    saved.write_bytes(
        saved.read_bytes().replace((1 << 27).to_bytes(4, "little"), declared.to_bytes(4, "little"))
    )
    tracemalloc.start()
    try:
        with pytest.raises(DamagedCheckpoint):
            read(saved)
        assert tracemalloc.get_traced_memory()[1] < 1 << 25
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("how", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_that_unpack_without_a_limit_are_refused(saved: Path, how: int) -> None:
    repacked(saved, how)
    with pytest.raises(DamagedCheckpoint, match="packed by another method"):
        read(saved)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_record_that_is_there_twice_is_refused(saved: Path) -> None:
    with zipfile.ZipFile(saved, "a") as archive:
        archive.writestr(
            next(name for name in archive.namelist() if name.endswith("data/0")), bytes(4000)
        )
    with pytest.raises(DamagedCheckpoint, match="is there twice"):
        read(saved)


def test_a_compressed_file_is_read_and_a_bomb_is_not(saved: Path) -> None:
    expected = torch.load(saved, weights_only=True)
    repacked(saved, zipfile.ZIP_DEFLATED)
    assert_same(read(saved), expected)
    repacked(saved, zipfile.ZIP_DEFLATED, {"data/0": bytes(1 << 26)})
    with pytest.raises(DamagedCheckpoint, match=r"would fill 67,\d+,\d+ bytes"):
        read(saved)


def test_numbers_that_are_not_there_are_told(saved: Path) -> None:
    repacked(saved, zipfile.ZIP_STORED, {"data/0": bytes(3996)})
    with pytest.raises(DamagedCheckpoint, match="fewer numbers"):
        read(saved)


def test_another_order_of_bytes_is_told(saved: Path) -> None:
    repacked(saved, zipfile.ZIP_STORED, {"byteorder": b"big"})
    with pytest.raises(DamagedCheckpoint, match="another order of bytes"):
        read(saved)


def test_a_storage_longer_than_an_old_file_is_told(tmp_path: Path) -> None:
    file = tmp_path / "x.pth"
    torch.save({"a": torch.ones(4)}, file, _use_new_zipfile_serialization=False)
    content = file.read_bytes()
    at = content.rindex(struct.pack("<q", 4))
    for count in (2**60, -4, 5):
        file.write_bytes(content[:at] + struct.pack("<q", count) + content[at + 8 :])
        with pytest.raises(DamagedCheckpoint, match="ends early"):
            read(file)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_programs_and_other_zips_are_called_what_they_are(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "script.pt")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as other:
        other.writestr("weights/model.pth", b"x")
    recwarn.clear()
    with pytest.raises(CheckpointError, match=r"script\.pt .*TorchScript"):
        read(tmp_path / "script.pt")
    with pytest.raises(CheckpointError, match=r"other\.zip .*torch\.save"):
        read(tmp_path / "other.zip")
    assert not list(recwarn)
