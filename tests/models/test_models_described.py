"""What a file may say of its backbone, and what would run code or take memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from relloc.errors import CheckpointError
from relloc.models import described
from relloc.models.backbone import Backbone
from relloc.models.described import backbones, described_backbone
from relloc.models.small import SmallBackbone

TARGET = "relloc.models.small.SmallBackbone"
WIDTHS = [8, 8, 8, 8, 8]


def weights() -> dict[str, Tensor]:
    return dict(SmallBackbone(widths=WIDTHS).state_dict())


def model(**node: Any) -> dict[str, Any]:
    return {"name": "small", "backbone": node}


def test_the_targets_of_all_models_in_conf_are_allowed() -> None:
    conf = Path(__file__).parents[2] / "conf" / "model"
    lines = [line.strip() for file in conf.glob("*.yaml") for line in file.read_text().splitlines()]
    targets = {line.removeprefix("_target_: ") for line in lines if line.startswith("_target_: ")}
    allowed = backbones()
    assert {
        target for target in targets if not target.startswith("relloc.models.pair_head.")
    } <= allowed.keys()
    assert TARGET in allowed
    assert all(name.startswith("relloc.models.") for name in allowed)


def test_a_backbone_is_built_as_it_is_described() -> None:
    made = described_backbone(model(_target_=TARGET, widths=WIDTHS), weights(), "x")
    assert type(made) is SmallBackbone
    assert made.stage_channels == tuple(WIDTHS)
    assert not any(value.is_meta for value in made.state_dict().values())


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"_target_": "torch.load", "f": "x"}, "torch.load"),
        ({"_target_": "pathlib.Path.write_text"}, "pathlib.Path.write_text"),
        ({"_target_": f"{TARGET}.load_state_dict"}, "load_state_dict"),
        ({"_target_": "relloc.models.backbone.Backbone"}, "relloc.models.backbone.Backbone"),
        ({"_target_": "relloc.models.resnet.ResNet"}, "relloc.models.resnet.ResNet"),
        ({"_target_": ["a"]}, "list"),
        ({}, "NoneType"),
        ({"_target_": TARGET, "widths": {"_target_": "os.system", "command": "x"}}, "os.system"),
        ({"_target_": TARGET, "widths": [{"a": [{"_target_": "os.system"}]}]}, "os.system"),
        ({"_target_": TARGET, "_partial_": True}, "_partial_"),
        ({"_target_": TARGET, "_args_": [WIDTHS]}, "_args_"),
        ({"_target_": TARGET, "widths": ["${oc.env:HOME}"]}, "${oc.env:HOME}"),
        ({"_target_": TARGET, "widths": [torch.ones(1)]}, "Tensor"),
        ({"_target_": TARGET, "widths": "_x"}, "can't be"),  # no order, but no widths either
        ({"_target_": TARGET, "widths": "\x1b[2J"}, "SmallBackbone"),
        ({"_target_": "\x1b[2J"}, "x1b"),
    ],
)
def test_anything_else_is_refused_with_what_it_wanted(node: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=r"^runs/x ") as raised:
        described_backbone(model(**node), weights(), "runs/x")
    assert message in str(raised.value)
    assert "model=NAME" in str(raised.value)
    assert str(raised.value).isprintable()


def test_a_backbone_that_extends_another_is_found_and_an_abstract_one_is_not() -> None:
    class Wider(SmallBackbone):
        __module__ = "relloc.models.wider"

    class Unfinished(Backbone):
        __module__ = "relloc.models.wider"

    found = backbones()
    assert found["relloc.models.wider.Wider"] is Wider
    assert Unfinished not in found.values()


@pytest.mark.parametrize("node", [None, "x", [], {"name": "small"}, {"backbone": []}])
def test_what_describes_no_backbone_is_an_error(node: object) -> None:
    with pytest.raises(CheckpointError, match="model=NAME"):
        described_backbone(node, weights(), "x")


@pytest.mark.parametrize(
    "widths",
    [
        [8],
        [8, 8, 8, 8, -1],
        [10**6] * 5,
        [2**62] * 5,
        [8, 8, 8, 8, 16],
        "abcde",
        [float("nan")] * 5,
        [[]] * 5,
    ],
)
def test_one_that_can_not_be_or_takes_more_than_its_weights_is_an_error(
    widths: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    monkeypatch.setattr(
        described,
        "_build",
        lambda *given: built.append(torch.empty(0).device.type) or original(*given),
    )
    with pytest.raises(CheckpointError):
        described_backbone(model(_target_=TARGET, widths=widths), weights(), "x")
    assert built == ["meta"]


original = described._build


def test_endless_descriptions_are_an_error() -> None:
    deep: list[Any] = []
    for _ in range(50):
        deep = [deep]
    for widths in (deep, [8] * 100_000):
        with pytest.raises(CheckpointError, match="more values"):
            described_backbone(model(_target_=TARGET, widths=widths), weights(), "x")
