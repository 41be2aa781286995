"""Files of other projects, imitated key by key (protocols.md 5.1)."""

import argparse
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from relloc.checkpoints.fitting import fill
from relloc.checkpoints.layouts import find, to_detectron2
from relloc.errors import CheckpointError
from relloc.models.resnet import ResNetBackbone
from relloc.pickles.inert import LeftOut

Weights = dict[str, Tensor]


def backbone_of(seed: int) -> ResNetBackbone:
    torch.manual_seed(seed)
    backbone = ResNetBackbone(depth=18).eval()
    for name, value in backbone.state_dict().items():
        if "running" in name:
            value.uniform_(0.5, 2)
    return backbone


@pytest.fixture(scope="module")
def ours() -> ResNetBackbone:
    return backbone_of(1)


@pytest.fixture(scope="module")
def weights(ours: ResNetBackbone) -> Weights:
    return dict(ours.state_dict())


def names_only(depth: int) -> Weights:
    with torch.device("meta"):
        return dict(ResNetBackbone(depth=depth).state_dict())


def below(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: tensor for name, tensor in weights.items()}


def detectron2_name(name: str) -> str:
    """As the dossier tells it, and another way round than ours: part by part."""
    parts = name.split(".")
    if not parts[0].startswith("layer"):
        parts.insert(0, "stem")
    joined = ".".join(
        {"downsample": "shortcut"}.get(
            part,
            f"conv{part[2:]}.norm"
            if part.startswith("bn")
            else f"res{int(part[5:]) + 1}"
            if part.startswith("layer")
            else part,
        )
        for part in parts
    )
    return joined.replace("shortcut.0", "shortcut").replace("shortcut.1", "shortcut.norm")


def without_counters(weights: Weights) -> Weights:
    return {
        name: tensor for name, tensor in weights.items() if not name.endswith("num_batches_tracked")
    }


ONE = torch.ones(2)
NECK_AND_HEAD = {
    **below(
        "neck.",
        {
            "fc.weight": ONE,
            "fc.bias": ONE,
            "bn.weight": ONE,
            "bn.num_batches_tracked": torch.tensor(3),
        },
    ),
    **below("head.", {"fc_cls.weight": ONE, "fc_cls.bias": ONE}),
}
OPTIMIZER = {
    "state": {0: {"momentum_buffer": ONE}, 1: {"momentum_buffer": ONE}},
    "param_groups": [{"lr": 0.2}],
}
FC = {"fc.weight": torch.ones(10, 512), "fc.bias": torch.ones(10)}


def vissl(weights: Weights) -> dict[str, Any]:
    model = {"trunk": below("_feature_blocks.", weights), "heads": {"0.clf.0.weight": ONE}}
    base_model = {"model": model, "meta": {"config": None}}
    state = {
        "base_model": base_model,
        "optimizer": OPTIMIZER,
        "loss": {"memory": ONE},
        "train": True,
    }
    return {"phase_idx": 3, "loss": 0.1, "classy_state_dict": state}


def mmselfsup_1(weights: Weights) -> dict[str, Any]:
    state = below("backbone.", weights) | NECK_AND_HEAD
    hub = {"log_scalars": {"train/lr": object()}}
    return {
        "meta": {"epoch": 70},
        "state_dict": state,
        "message_hub": hub,
        "param_schedulers": [{"last_step": 2}],
    }


def timm_training(weights: Weights, **more: Any) -> dict[str, Any]:
    about = {
        "epoch": 3,
        "arch": "resnet18",
        "version": 2,
        "args": argparse.Namespace(lr=0.1),
        "metric": 0.5,
    }
    return {
        **about,
        "state_dict": weights | FC,
        "optimizer": OPTIMIZER,
        "amp_scaler": {"scale": 65536.0},
        **more,
    }


LAYOUTS: dict[str, tuple[Callable[[Weights], dict[str, Any]], str, dict[str, int]]] = {
    "mmselfsup 0.x training": (
        lambda w: {
            "meta": {"epoch": 70},
            "state_dict": below("backbone.", w) | NECK_AND_HEAD,
            "optimizer": OPTIMIZER,
        },
        "mmselfsup 0.x or OpenSelfSup, as trained",
        {"neck": 4, "head": 2, "state of the training": 2},
    ),
    "mmselfsup 0.x published": (
        lambda w: {"state_dict": w, "author": "OpenMMLab"},
        "mmselfsup 0.x or OpenSelfSup, as published",
        {},
    ),
    "OpenSelfSup training": (
        lambda w: {
            "meta": {"openselfsup_version": "0.2.0", "epoch": 70, "iter": 175140},
            "state_dict": below("backbone.", w) | NECK_AND_HEAD,
            "optimizer": OPTIMIZER,
        },
        "mmselfsup 0.x or OpenSelfSup, as trained",
        {"neck": 4, "head": 2, "state of the training": 2},
    ),
    "OpenSelfSup published": (
        lambda w: {"state_dict": w, "author": "OpenSelfSup"},
        "mmselfsup 0.x or OpenSelfSup, as published",
        {},
    ),
    "mmselfsup 1.x": (mmselfsup_1, "mmselfsup 1.x", {"neck": 4, "head": 2}),
    "torchvision": (lambda w: w | FC, "torchvision or timm", {"classifier": 2}),
    "timm published": (
        lambda w: without_counters(w) | FC,
        "torchvision or timm",
        {"classifier": 2},
    ),
    "timm training": (
        timm_training,
        "torchvision's names below state_dict",
        {"classifier": 2, "state of the training": 2},
    ),
    "VISSL": (vissl, "VISSL", {"head": 1, "state of the training": 3}),
    "VISSL's trunk": (
        lambda w: {"model_state_dict": below("_feature_blocks.", without_counters(w))},
        "VISSL",
        {},
    ),
    "detectron2": (
        lambda w: {
            "model": {detectron2_name(name): tensor for name, tensor in (w | FC).items()},
            "__author__": "torchvision",
            "matching_heuristics": True,
        },
        "detectron2's names",
        {"classifier": 2},
    ),
    "plain, with a prefix": (
        lambda w: below("encoder.", w),
        "torchvision's names below encoder",
        {},
    ),
    "DataParallel": (
        lambda w: below("module.", w | FC),
        "torchvision's names below module",
        {"classifier": 2},
    ),
    "MoCo": (
        lambda w: {
            "state_dict": below("module.encoder_q.", w | {"fc.0.weight": ONE})
            | {"module.queue": ONE}
        },
        "torchvision's names below state_dict.module.encoder_q",
        {"classifier": 1, "queue or memory bank": 1},
    ),
    "SwAV": (
        lambda w: {
            "model": below(
                "module.", w | {"projection_head.0.weight": ONE, "prototypes.weight": ONE}
            )
        },
        "torchvision's names below model.module",
        {"head": 1, "projection or prediction": 1},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_forward_to_the_bit(
    ours: ResNetBackbone, weights: Weights, layout: str
) -> None:
    imitate, name, left_out = LAYOUTS[layout]
    found = find(imitate(weights), origin="x.pth")
    assert found.model == "resnet18"
    assert (found.layout, dict(found.left_out)) == (name, left_out)
    other = backbone_of(2)
    fill(other, found.fitted(other.state_dict()), "x.pth")
    images = torch.rand(1, 3, 48, 48)
    with torch.no_grad():
        expected, maps = ours(images), other(images)
    assert all(torch.equal(maps[stage], expected[stage]) for stage in expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_every_layout_missing_and_foreign_tensors_are_named(
    weights: Weights, layout: str
) -> None:
    imitate, name, _ = LAYOUTS[layout]
    changed = {name: tensor for name, tensor in weights.items() if name != "layer2.1.conv2.weight"}
    changed |= {"layer3.0.se.weight": ONE, "bn1.bias": ONE}
    with pytest.raises(CheckpointError) as raised:
        find(imitate(changed), origin="x.pth").fitted(weights)
    message = str(raised.value)
    assert message.startswith(f"x.pth ({name}) ")
    for part in (
        "1 missing (layer2.1.conv2.weight)",
        "1 unknown (layer3.0.se.weight)",
        "1 of another shape (bn1.bias [2] for [64])",
        "mmselfsup 0.x",
    ):
        assert part in message


def test_the_318_tensors_of_a_resnet50_go_to_detectron2_and_back() -> None:
    weights = names_only(50)
    assert len(weights) == 318
    theirs = to_detectron2(weights)
    assert list(theirs) == [detectron2_name(name) for name in weights]
    assert "res4.0.shortcut.norm.running_var" in theirs
    found = find({"model": theirs}, origin="x.pkl")
    assert found.model == "resnet50"
    assert list(found.weights) == list(weights)
    assert all(found.weights[name] is weights[name] for name in weights)


TWO = {
    "encoders": lambda w, other: {
        "state_dict": below("module.encoder_q.", w) | below("module.encoder_k.", other)
    },
    "average": lambda w, other: timm_training(w, state_dict_ema=other | FC),
    "teacher": lambda w, other: {
        "student": below("module.backbone.", w),
        "teacher": below("backbone.", other),
    },
}


@pytest.mark.parametrize(
    ("file", "names", "first", "second"),
    [
        (
            "encoders",
            "state_dict.module.encoder_q, state_dict.module.encoder_k",
            "encoder_q",
            "module.encoder_k.",
        ),
        ("average", "state_dict, state_dict_ema", "state_dict", "state_dict_ema"),
        ("teacher", "student.module.backbone, teacher.backbone", "student", "teacher.backbone"),
    ],
)
def test_of_several_backbones_one_is_to_be_named(
    weights: Weights, file: str, names: str, first: str, second: str
) -> None:
    other = {name: tensor + 1 for name, tensor in weights.items()}
    content = TWO[file](weights, other)
    with pytest.raises(CheckpointError) as raised:
        find(content, origin="x.pth")
    message = str(raised.value)
    assert message.startswith("x.pth ")
    assert f"2 backbones: {names}." in message
    assert f"checkpoint_prefix={names.partition(',')[0]} " in message
    assert "--checkpoint-prefix" in message
    for prefix, expected in ((first, weights), (second, other)):
        chosen = find(content, origin="x.pth", prefix=prefix).fitted(weights)
        assert all(torch.equal(chosen[name], expected[name]) for name in expected)
    with pytest.raises(CheckpointError, match=rf"no backbone below encoder\b.*: {names}\."):
        find(content, origin="x.pth", prefix="encoder")


def test_a_backbone_without_prefix_is_named_by_an_empty_one(weights: Weights) -> None:
    content = weights | below("ema.", weights)
    with pytest.raises(
        CheckpointError,
        match=r"\(no prefix\), ema\..* checkpoint_prefix=''",
    ):
        find(content, origin="x.pth")
    found = find(content, origin="x.pth", prefix="")
    assert dict(found.left_out) == {"momentum encoder": len(weights)}
    assert all(found.weights[name] is weights[name] for name in weights)


def test_all_that_does_not_fit_is_one_message(weights: Weights) -> None:
    state = below(
        "backbone.",
        weights | {"layer1.0.se.fc1.weight": ONE, "conv1.weight": torch.ones(64, 1, 7, 7)},
    )
    for name in (
        "bn1.running_var",
        "layer4.1.conv2.weight",
        "layer4.1.bn2.weight",
        "layer4.1.bn2.bias",
    ):
        del state[f"backbone.{name}"]
    found = find({"state_dict": state | {"decoder.weight": ONE}}, origin="x.pth")
    with pytest.raises(CheckpointError) as raised:
        found.fitted(weights)
    message = str(raised.value)
    assert message.startswith("x.pth (mmselfsup 0.x or OpenSelfSup, as trained) ")
    for part in (
        "4 missing (bn1.running_var, layer4.1.conv2.weight, layer4.1.bn2.weight, …)",
        "1 unknown (layer1.0.se.fc1.weight)",
        "1 of another shape (conv1.weight [64, 1, 7, 7] for [64, 3, 7, 7])",
    ):
        assert part in message


@pytest.mark.parametrize("prefix", [None, "backbone"])
def test_tensors_outside_the_backbone_that_nobody_knows_are_left_out_and_named(
    weights: Weights, prefix: str | None
) -> None:
    state = below("backbone.", weights) | {"decoder.weight": ONE, "backbone2.weight": ONE}
    content = {
        "state_dict": state,
        "best_acc1": torch.tensor(71.2),
        "rng_state": torch.get_rng_state(),
    }
    found = find(content, origin="x.pth", prefix=prefix)
    assert len(found.fitted(weights)) == len(weights)
    assert dict(found.left_out) == {"others outside the backbone": 4}
    assert set(found.others) == {
        "state_dict.decoder.weight",
        "state_dict.backbone2.weight",
        "best_acc1",
        "rng_state",
    }
    left_out = str(found).partition("left out: ")[2]
    assert left_out.startswith("4 of ")
    assert "(state_dict.decoder.weight, " in left_out


def test_what_was_not_read_is_named_with_what_was_found(weights: Weights) -> None:
    content = {
        "state_dict": below("backbone.", weights),
        "args": {"data": [LeftOut("pathlib.PosixPath"), LeftOut("pathlib.PosixPath")]},
        "when": (LeftOut("datetime.datetime"),),
    }
    found = find(content, origin="x.pth")
    assert found.objects == ["pathlib.PosixPath", "datetime.datetime"]
    assert "pathlib.PosixPath, datetime.datetime" in str(found)
    with pytest.raises(CheckpointError, match=r"models\.Net .*not read"):
        find({"model": LeftOut("models.Net"), "rng": ONE}, origin="x.pth")


CHILDREN = {
    "conv1": "0",
    "bn1": "1",
    "layer1": "4",
    "layer2": "5",
    "layer3": "6",
    "layer4": "7",
    "fc": "9",
}


def children(weights: Weights) -> Weights:
    named = {name: name.partition(".") for name in weights}
    return {f"{CHILDREN[first]}.{rest}": weights[name] for name, (first, _, rest) in named.items()}


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.encoder.0."])
def test_the_numbered_children_of_a_resnet_are_its_weights(weights: Weights, prefix: str) -> None:
    found = find({"state_dict": below(prefix, children(weights | FC))}, origin="x.pth")
    assert dict(found.left_out) == {"classifier": 2}
    assert found.model == "resnet18"
    assert all(found.fitted(weights)[name] is weights[name] for name in weights)
    with pytest.raises(CheckpointError, match=r"1 unknown \(3\.weight\)"):
        find(below(prefix, children(weights) | {"3.weight": ONE}), origin="x.pth").fitted(weights)


@pytest.mark.parametrize(
    "wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]
)
def test_torchs_wrappers_may_be_anywhere_in_names(weights: Weights, wrapper: str) -> None:
    content = {}
    for name, tensor in weights.items():
        inside = name.replace("layer1.", f"layer1.{wrapper}.").replace(".0.", f".0.{wrapper}.")
        content[f"module.{wrapper}.{inside}"] = tensor
    for prefix in (None, "module", f"module.{wrapper}"):
        assert find(content, origin="x", prefix=prefix).weights.keys() == weights.keys()


def test_checkpoints_of_lightning_are_called_by_their_name(weights: Weights) -> None:
    for state in (weights, children(weights)):
        content = {
            "pytorch-lightning_version": "2.2.0",
            "epoch": 9,
            "state_dict": below("backbone.", state),
        }
        found = find(content, origin="x.pth")
        assert found.layout.startswith("PyTorch Lightning")
        assert len(found.fitted(weights)) == len(weights)


def test_a_network_that_is_none_of_ours_is_told_by_its_blocks() -> None:
    larger = names_only(50) | {f"layer3.{block}.conv1.weight": ONE for block in range(6, 23)}
    with pytest.raises(
        CheckpointError,
        match=r"3-4-23-3 bottleneck blocks.* resnet18, resn",
    ):
        find(larger, origin="x.pth").model_or_advice()


def test_a_deep_stem_is_told() -> None:
    weights = names_only(50)
    deep = {name: tensor for name, tensor in weights.items() if name != "conv1.weight"} | below(
        "conv1.0.", {"weight": ONE}
    )
    with pytest.raises(
        CheckpointError, match=r"1 missing \(conv1\.weight\); 1 unknown \(conv1\.0\.weight\)"
    ):
        find(deep, origin="resnet50d").fitted(weights)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            {"cls_token": ONE, "blocks.0.attn.qkv.weight": ONE},
            r"no ResNet .*2 tensors .*\bcls_token\b",
        ),
        ({"model": {}, "epoch": 3}, r"no tensors .*: model, epoch\)"),
        ({}, r"no tensors .*: nothing\)"),
    ],
)
def test_what_holds_no_resnet_is_an_error(content: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^x\.pth .*{reason}"):
        find(content, origin="x.pth")
