import argparse
import os
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from relloc.checkpoints.weight_files import read
from relloc.errors import CheckpointError
from relloc.pickles.inert import LeftOut

WEIGHTS = {
    "a.weight": torch.tensor([[1.5, -0.0], [3e38, 1e-40]]),
    "a.count": torch.tensor(7),
    "half": torch.ones(3).half(),
}


def assert_weights(content: dict[str, Any]) -> None:
    assert list(content) == list(WEIGHTS)
    for name, tensor in WEIGHTS.items():
        assert isinstance(content[name], Tensor)
        assert content[name].dtype == tensor.dtype
        assert content[name].shape == tensor.shape
        assert torch.equal(content[name], tensor)


def arrays() -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in WEIGHTS.items()}


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saved_comes_back_nested_as_it_was(tmp_path: Path, zipped: bool) -> None:
    content = {"epoch": 3, "state_dict": WEIGHTS, "more": [1, None, {"x": "ä"}], 4: 0.5}
    torch.save(content, tmp_path / "x.pth.tar", _use_new_zipfile_serialization=zipped)
    found = read(tmp_path / "x.pth.tar")
    assert_weights(found.pop("state_dict"))
    assert found == {"epoch": 3, "more": [1, None, {"x": "ä"}], "4": 0.5}


def test_safetensors_are_known_by_their_content_not_by_their_name(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "pytorch_model.bin", metadata={"format": "pt"})
    found = read(tmp_path / "pytorch_model.bin")
    assert_weights({name: found[name] for name in WEIGHTS})


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_of_arrays_as_detectron2s_converters_write_it(
    tmp_path: Path, protocol: int
) -> None:
    content = {"model": arrays(), "__author__": "torchvision", "matching_heuristics": True}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    found = read(tmp_path / "x.pkl")
    assert_weights(found.pop("model"))
    assert found == {"__author__": "torchvision", "matching_heuristics": True}


def test_arrays_in_what_torch_saved_and_those_of_another_byte_order_become_tensors(
    tmp_path: Path,
) -> None:
    torch.save(arrays(), tmp_path / "x.pth")
    assert_weights(read(tmp_path / "x.pth"))
    swapped = {
        name: array.astype(array.dtype.newbyteorder(">")) for name, array in arrays().items()
    }
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(swapped, protocol=4))
    assert_weights(read(tmp_path / "x.pkl"))


@pytest.fixture
def history_buffer(monkeypatch: pytest.MonkeyPatch) -> type:
    """mmengine's class by its name, with what mmselfsup 1.x leaves in its message_hub."""
    module = types.ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        def __init__(self) -> None:
            self._log_history = np.arange(3.0)
            self.statistics = {"min": HistoryBuffer.min}  # pickled as a call of getattr

        def min(self) -> float:
            return self._log_history.min()

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    HistoryBuffer.min.__module__, HistoryBuffer.min.__qualname__ = (
        module.__name__,
        "HistoryBuffer.min",
    )
    module.HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return HistoryBuffer


def test_notes_of_mmengine_and_argparse_are_dropped_and_need_no_class(
    tmp_path: Path, history_buffer: type
) -> None:
    scalars = {"loss": history_buffer(), "best": np.float64(0.5), "lr": np.array([0.1, 0.2])}
    torch.save(
        {"state_dict": WEIGHTS, "args": argparse.Namespace(lr=0.1), "hub": scalars},
        tmp_path / "x.pth",
    )
    del sys.modules["mmengine.logging.history_buffer"]
    found = read(tmp_path / "x.pth")
    assert_weights(found["state_dict"])
    assert found["args"] == LeftOut("argparse.Namespace")
    assert found["hub"]["loss"] == LeftOut("mmengine.logging.history_buffer.HistoryBuffer")
    assert found["hub"]["best"] == 0.5
    assert torch.equal(found["hub"]["lr"], torch.tensor([0.1, 0.2], dtype=torch.float64))


class RunsCode:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


class Model:
    pass


def save(file: Path, way: str, content: Any) -> None:
    if way == "pickle":
        file.write_bytes(pickle.dumps(content, protocol=4))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=way == "zip")


@pytest.mark.parametrize("way", ["zip", "legacy", "pickle"])
def test_code_in_a_file_is_not_run_and_what_it_would_be_is_named(tmp_path: Path, way: str) -> None:
    weights = arrays() if way == "pickle" else WEIGHTS
    for content, name in (
        (RunsCode(tmp_path / "ran"), "posix.mkdir"),
        (Model(), f"{Model.__module__}.Model"),
    ):
        save(tmp_path / "evil.pkl", way, {"model": weights, "more": content})
        found = read(tmp_path / "evil.pkl")
        assert_weights(found["model"])
        assert found["more"] == LeftOut(name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("way", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_pickled_model_is_refused_and_its_class_is_named(
    tmp_path: Path, way: str, nested: bool
) -> None:
    file = tmp_path / "whole.pt"
    save(
        file,
        way,
        {"epoch": 3, "opt": argparse.Namespace(), "model": Model()} if nested else Model(),
    )
    with pytest.raises(CheckpointError) as raised:
        read(file)
    message = str(raised.value)
    assert message.startswith(f"{file} ")
    assert f"{Model.__module__}.Model" in message
    assert "state_dict()" in message


def test_no_file_can_change_what_reads_the_next_one(tmp_path: Path) -> None:
    # Sets an attribute of the function
    evil = b"\x80\x04cnumpy._core.multiarray\n_reconstruct\nN}\x8c\x01xK\x01s\x86b."
    (tmp_path / "evil.pkl").write_bytes(evil)
    with pytest.raises(CheckpointError, match=r"evil\.pkl is damaged"):
        read(tmp_path / "evil.pkl")


def contents(tmp_path: Path) -> dict[str, bytes]:
    torch.save(WEIGHTS, tmp_path / "zip")
    torch.save(WEIGHTS, tmp_path / "legacy", _use_new_zipfile_serialization=False)
    save_file(WEIGHTS, tmp_path / "safetensors")
    (tmp_path / "pickle").write_bytes(pickle.dumps(arrays(), protocol=4))
    whole = {
        name: (tmp_path / name).read_bytes() for name in ("zip", "legacy", "safetensors", "pickle")
    }
    return {f"{name} cut at {part}": content[: int(len(content) * part)]
            for name, content in whole.items() for part in (0.5, 0.95)}  # fmt: skip


def test_a_file_that_ends_early_is_damaged(tmp_path: Path) -> None:
    for content in contents(tmp_path).values():
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"/x is damaged.*: \S") as raised:
            read(tmp_path / "x")
        assert "weights_only" not in str(raised.value)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"<html>404</html>", r"safetensors.* torch\.save.* numpy"),
        (bytes(1000), "neither safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "LFS pointer.* git lfs pull"),
    ],
)
def test_what_is_no_file_of_weights_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"x\.pth is damaged.*: .*{reason}"):
        read(tmp_path / "x.pth")


def test_a_missing_file_a_folder_and_a_lone_tensor_are_errors(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"none\.pth does not exist",
    ):
        read(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match=r"\(Is a directory\)"):
        read(tmp_path)
    torch.save(torch.ones(3), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x\.pth .*\bTensor\b"):
        read(tmp_path / "x.pth")
