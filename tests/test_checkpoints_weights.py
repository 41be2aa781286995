"""Of checkpoints: which files are ours, what weights are told apart by, and which are refused."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from relloc.checkpoints import BACKBONE_FILE, digest, fill, is_ours, save_backbone, save_training
from relloc.errors import CheckpointError


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def test_what_relloc_wrote_is_ours_and_nothing_else(tmp_path: Path) -> None:
    save_backbone(tmp_path / BACKBONE_FILE, network(), {"model": {}})
    assert is_ours(tmp_path / BACKBONE_FILE)
    assert is_ours(save_training(tmp_path, {"model": {}, "about": {}}, 1))
    save_file({"conv1.weight": torch.ones(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    torch.save({"state_dict": {}, "step": 3}, tmp_path / "epoch_3.pt")
    torch.save({"model": network()}, tmp_path / "whole.pt")  # a pickled class, which is not read
    torch.save({"model": {}}, tmp_path / "x.pth")
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04 and nothing more")
    for name in ("model.safetensors", "epoch_3.pt", "whole.pt", "x.pth", "broken.pt", "none.pt", "."):
        assert not is_ours(tmp_path / name), name


def changed(state: dict[str, Tensor], name: str, tensor: Tensor) -> dict[str, Tensor]:
    return {**state, name: tensor}


def test_a_digest_depends_on_names_shapes_types_and_bits_and_on_nothing_else() -> None:
    state = dict(network().state_dict())
    first = digest(state)
    assert len(first) == 16
    assert int(first, 16) >= 0
    same = {name: state[name].to(memory_format=torch.channels_last) if state[name].dim() == 4 else state[name].clone()
            for name in reversed(state)}  # fmt: skip
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
    # printf 'a [] torch.int64\n' and eight 0xff, 'b [3] torch.float32\n' and 0, 1, 2 in IEEE 754 | sha256sum
    assert digest(state) == "55f68af0c579c436"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused_and_named(value: float) -> None:
    backbone = network()
    weights = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    before = digest(backbone.state_dict())
    weights["1.running_var"][2] = value
    with pytest.raises(CheckpointError) as raised:
        fill(backbone, weights, "x.pth")
    assert str(raised.value) == (
        "x.pth holds NaN or infinite weights, in 1 of 7 tensors, such as 1.running_var: its training diverged or the "
        "file is damaged; take an earlier or another one"
    )
    assert digest(backbone.state_dict()) == before
