"""Backbones in files: loading them, telling ours and their weights apart, and refusing others."""

import math
import os
import subprocess
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from relloc.checkpoints.backbone_files import (
    BACKBONE_FILE,
    backbone_file,
    digest,
    is_ours,
    load_backbone,
    model_name,
    save_backbone,
)
from relloc.checkpoints.fitting import fill
from relloc.checkpoints.states import save_training
from relloc.errors import CheckpointError, DamagedCheckpoint

ABOUT = {
    "model": {"name": "tiny", "backbone": {"widths": [4, 8]}},
    "step": 3,
    "computed": {"path": "/ä/𝄞"},
}


def network(seed: int = 0, width: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))
    layers(torch.randn(2, 3, 7, 7))  # running statistics of its own
    return layers


def test_what_relloc_wrote_is_ours_and_nothing_else(tmp_path: Path) -> None:
    save_backbone(tmp_path / BACKBONE_FILE, network(), {"model": {}})
    assert is_ours(tmp_path / BACKBONE_FILE)
    assert is_ours(save_training(tmp_path, {"model": {}, "about": {}}, 1))
    save_file(
        {"conv1.weight": torch.ones(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    torch.save({"state_dict": {}, "step": 3}, tmp_path / "epoch_3.pt")
    torch.save({"model": network()}, tmp_path / "whole.pt")  # a pickled class, which is not read
    torch.save({"model": {}}, tmp_path / "x.pth")
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04 and nothing more")
    for name in (
        "model.safetensors",
        "epoch_3.pt",
        "whole.pt",
        "x.pth",
        "broken.pt",
        "none.pt",
        ".",
    ):
        assert not is_ours(tmp_path / name), name


def changed(state: dict[str, Tensor], name: str, tensor: Tensor) -> dict[str, Tensor]:
    return {**state, name: tensor}


def test_a_digest_depends_on_names_shapes_types_and_bits_and_on_nothing_else() -> None:
    state = dict(network().state_dict())
    first = digest(state)
    assert len(first) == 16
    assert int(first, 16) >= 0
    same = {}
    for name in reversed(state):
        is_map = state[name].dim() == 4
        layout = torch.channels_last if is_map else torch.contiguous_format
        same[name] = state[name].clone(memory_format=layout)
    counted = changed(same, "1.num_batches_tracked", torch.tensor(99))
    without = {name: tensor for name, tensor in same.items() if name != "1.num_batches_tracked"}
    assert {digest(same), digest(counted), digest(without)} == {first}
    weight, bias = state["0.weight"], state["0.bias"]
    nudged = weight.clone()
    nudged.view(-1).view(torch.int32)[5] ^= 1
    renamed = {name.replace("bias", "shift"): tensor for name, tensor in state.items()}
    others = [
        changed(state, "0.weight", nudged),
        changed(state, "0.weight", weight.reshape(3, 4, 3, 3)),
        changed(state, "0.bias", bias.view(torch.int32)),
        changed(state, "0.bias", bias[:2]),
        renamed,
        {},
    ]
    assert len({first, *map(digest, others)}) == 1 + len(others)


def test_a_digest_is_the_same_on_every_machine() -> None:
    state = {"b": torch.arange(3, dtype=torch.float32), "a": torch.tensor(-1, dtype=torch.int64)}
    # The sha256sum of 'a [] torch.int64\n' and eight 0xff, 'b [3] torch.float32\n' and 0, 1, 2 in
    # IEEE 754
    assert digest(state) == "55f68af0c579c436"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused_and_named(value: float) -> None:
    backbone = network()
    weights = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    before = digest(backbone.state_dict())
    weights["1.running_var"][2] = value
    with pytest.raises(CheckpointError, match=r"^x\.pth .*NaN.* 1 of 7 tensors.* 1\.running_var\b"):
        fill(backbone, weights, "x.pth")
    assert digest(backbone.state_dict()) == before


@pytest.mark.parametrize("given", ["folder", "safetensors", "training"])
def test_a_backbone_loads_from_a_run_folder_its_file_or_a_training(
    tmp_path: Path, given: str
) -> None:
    model = nn.ModuleDict({"backbone": network(seed=3), "head": nn.Linear(2, 2)})
    save_backbone(tmp_path / BACKBONE_FILE, model["backbone"], ABOUT)
    saved = save_training(tmp_path, {"model": model.state_dict(), "about": ABOUT}, 3)
    paths = {"folder": tmp_path, "safetensors": tmp_path / BACKBONE_FILE, "training": saved}
    weights, about = load_backbone(paths[given])
    assert about == ABOUT
    other = network(seed=1)
    fill(other, weights, "it")
    assert all(
        torch.equal(value, other.state_dict()[name])
        for name, value in model["backbone"].state_dict().items()
    )


@pytest.mark.parametrize("name", [b"caf\xe9", "𝄞".encode(), b"\\xe9"])
def test_a_backbone_lies_in_a_folder_of_any_name(tmp_path: Path, name: bytes) -> None:
    run_dir = tmp_path / os.fsdecode(name)
    run_dir.mkdir()
    backbone = network()
    save_backbone(run_dir / BACKBONE_FILE, backbone, ABOUT)
    assert is_ours(run_dir / BACKBONE_FILE)
    weights, about = load_backbone(run_dir)
    assert about == ABOUT
    assert digest(weights) == digest(backbone.state_dict())


def test_a_backbone_in_channels_last_comes_back_as_it_was(tmp_path: Path) -> None:
    backbone = network().to(memory_format=torch.channels_last)
    save_backbone(tmp_path / BACKBONE_FILE, backbone, {})
    weights, about = load_backbone(tmp_path)
    assert about == {}
    assert all(torch.equal(value, weights[name]) for name, value in backbone.state_dict().items())


def test_a_turned_byte_is_told_by_the_hash_beside_a_backbone_which_sha256sum_checks(
    tmp_path: Path,
) -> None:
    file = tmp_path / BACKBONE_FILE
    save_backbone(file, network(), ABOUT)
    checked = subprocess.run(
        ["sha256sum", "--check", f"{BACKBONE_FILE}.sha256"], cwd=tmp_path, check=False
    )
    assert checked.returncode == 0
    content = bytearray(file.read_bytes())
    content[-10] ^= 0x10
    file.write_bytes(content)
    for path in (tmp_path, file):
        with pytest.raises(
            DamagedCheckpoint,
            match=r"SHA-256 .*backbone\.safetensors\.sha256",
        ):
            load_backbone(path)


def test_a_backbone_that_was_copied_alone_or_is_of_an_older_version_is_read(tmp_path: Path) -> None:
    save_backbone(tmp_path / BACKBONE_FILE, network(), ABOUT)
    (tmp_path / f"{BACKBONE_FILE}.sha256").unlink()
    assert load_backbone(tmp_path)[1] == ABOUT


@pytest.mark.parametrize("about", ["[1]", "{", "[" * 100_000, '"x"'])
def test_what_a_file_tells_of_itself_is_a_mapping_or_an_error(tmp_path: Path, about: str) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors", metadata={"relloc": about})
    with pytest.raises(DamagedCheckpoint, match=r"x\.safetensors is damaged"):
        load_backbone(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "about", [{}, {"model": []}, {"model": {}}, {"model": {"name": 3}}, {"model": {"name": "\x1b"}}]
)
def test_a_model_without_a_name_is_an_error(about: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"give model=NAME"):
        model_name(about, Path("x"))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_numbers_of_another_kind_do_not_fit(dtype: torch.dtype) -> None:
    weights = dict(network(seed=1).state_dict())
    weights["0.weight"] = weights["0.weight"].to(dtype)
    with pytest.raises(CheckpointError, match=r"1 of another type \(0\.weight\)"):
        fill(network(), weights, "it")


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn]
)
def test_other_precisions_fit(dtype: torch.dtype) -> None:
    weights = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor
               for name, tensor in network(seed=1).state_dict().items()}  # fmt: skip
    backbone = network()
    fill(backbone, weights, "it")
    assert torch.equal(backbone.state_dict()["0.weight"], weights["0.weight"].float())


def test_what_holds_no_backbone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"backbone\.safetensors does not exist",
    ):
        load_backbone(tmp_path)
    with pytest.raises(CheckpointError, match=r"none\.safetensors .*not exist"):
        load_backbone(tmp_path / "none.safetensors")
    (tmp_path / BACKBONE_FILE).write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match=r"backbone\.safetensors .*damaged"):
        load_backbone(tmp_path)
    save_file({"conv1.weight": torch.ones(2)}, tmp_path / BACKBONE_FILE)
    with pytest.raises(CheckpointError, match="backbone is unknown"):
        load_backbone(tmp_path)


def test_another_backbone_is_an_error_that_counts_what_does_not_fit_and_changes_nothing() -> None:
    backbone = network()
    before = OrderedDict((name, value.clone()) for name, value in backbone.state_dict().items())
    weights = dict(network(seed=1, width=6).state_dict())
    del weights["1.weight"], weights["1.bias"]
    weights["fc.weight"] = torch.ones(1)
    with pytest.raises(CheckpointError) as raised:
        fill(backbone, weights, "runs/one (a resnet50)")
    message = str(raised.value)
    assert message.startswith("runs/one (a resnet50) ")
    missing, unknown, of_another_shape = message.split(";")
    assert "2 missing (1.weight, 1.bias)" in missing
    assert "1 unknown (fc.weight)" in unknown
    assert "4 of another shape" in of_another_shape
    for name, given, expected in (
        ("0.weight", [6, 3, 3, 3], [4, 3, 3, 3]),
        ("0.bias", [6], [4]),
        ("1.running_mean", [6], [4]),
    ):
        assert f"{name} {given} for {expected}" in of_another_shape
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("missing", r"1 missing \(1\.running_var\)"),
        ("unknown", r"1 unknown \(extra\)"),
        ("shape", "1 of another"),
    ],
)
def test_one_tensor_that_does_not_fit_is_enough(change: str, difference: str) -> None:
    weights = dict(network(seed=1).state_dict())
    if change == "missing":
        del weights["1.running_var"]
    elif change == "unknown":
        weights["extra"] = torch.ones(1)
    else:
        weights["0.bias"] = torch.ones(1)  # torch would broadcast it
    with pytest.raises(CheckpointError, match=f"^it .*{difference}"):
        fill(network(), weights, "it")


def test_pipes_in_the_place_of_weights_or_their_hash_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / BACKBONE_FILE)
    assert not is_ours(tmp_path / BACKBONE_FILE)
    with pytest.raises(CheckpointError):
        load_backbone(tmp_path)
    (tmp_path / BACKBONE_FILE).unlink()
    save_backbone(tmp_path / BACKBONE_FILE, network(), ABOUT)
    (tmp_path / f"{BACKBONE_FILE}.sha256").unlink()
    os.mkfifo(tmp_path / f"{BACKBONE_FILE}.sha256")
    with pytest.raises(CheckpointError, match="is no file"):
        load_backbone(tmp_path)


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "loop"])
def test_what_no_file_can_be_called_is_one_message(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match="is no path"):
        backbone_file(tmp_path / name)


def test_weights_that_the_backbone_can_not_hold_or_use_are_refused() -> None:
    layers = network()
    state = dict(layers.state_dict())
    with pytest.raises(CheckpointError, match=r"NaN .* 0\.weight"):
        fill(
            layers,
            changed(state, "0.weight", torch.full((4, 3, 3, 3), 1e300, dtype=torch.float64)),
            "x",
        )
    with pytest.raises(CheckpointError, match=r"negative variances in 1\.running_var"):
        fill(layers, changed(state, "1.running_var", -state["1.running_var"]), "x")
    fill(layers, changed(state, "0.weight", state["0.weight"].double()), "x")


def test_names_of_tensors_can_not_write_on_a_terminal() -> None:
    layers = network()
    with pytest.raises(CheckpointError, match=r"\\x1b\[2J\\n"):
        fill(layers, {**layers.state_dict(), "\x1b[2J\n": torch.ones(1)}, "x")
