"""Other projects' names for a ResNet's weights: finding them in a file, to our names and back.

Ours are torchvision's, which mmselfsup, OpenSelfSup, timm and VISSL share below some prefix
(protocols.md 5.1). detectron2 has names of its own.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from relloc.checkpoints.fitting import check_fits, first_of
from relloc.checkpoints.weight_files import leaves
from relloc.errors import CheckpointError
from relloc.pickles.inert import LeftOut

KNOWN = (
    "mmselfsup 0.x and 1.x, OpenSelfSup, torchvision, timm, VISSL, PyTorch Lightning and detectron2 ResNets, "
    "the numbered children of torchvision's in an nn.Sequential, and state dicts of such names with any prefix"
)
_MODELS: Mapping[tuple[str, tuple[int, ...]], str] = {
    ("basic", (2, 2, 2, 2)): "resnet18",
    ("bottleneck", (3, 4, 6, 3)): "resnet50",
}
# How a file names stage 1, and with it everything else
_STAGE_1 = re.compile(r"(?P<prefix>(?:.*\.)?)(?P<stage>layer1|res2|4)\.0\.conv1\.weight")
# A part of a dotted name that tells that no backbone is below it, and what is.
_LEFT_OUT = {
    "classifier": r"fc|fc_cls|classifier|last_linear",
    "neck": r"neck|necks",
    "head": r"head|heads|\w+_head",
    "projection or prediction": r"proj|projector|projection|mlp|predictor|prediction|prototypes|\w+_projector|\w+_mlp",
    "momentum encoder": r"encoder_k|teacher|target|target_\w+|momentum_\w+|ema|\w+_ema",
    "queue or memory bank": r"queue\w*|memory|memory_bank|feature_bank|center",
    "state of the training": r"optimizer\w*|\w*scheduler\w*|\w*scaler|amp|loss|criterion|meta|message_hub|callbacks",
    "input normalization": r"data_preprocessor|pixel_mean|pixel_std",
}
_TO_DETECTRON2 = (
    (r"^bn1\.", "stem.conv1.norm."),
    (r"^conv1\.", "stem.conv1."),
    (r"^layer(\d)\.", lambda found: f"res{int(found[1]) + 1}."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
)
_FROM_DETECTRON2 = (
    (r"^stem\.conv1\.norm\.", "bn1."),
    (r"^stem\.", ""),  # their converter writes stem.fc, too
    (r"^res(\d)\.", lambda found: f"layer{int(found[1]) - 1}."),
    (r"\.conv(\d)\.norm\.", r".bn\1."),
    (r"\.shortcut\.norm\.", ".downsample.1."),
    (r"\.shortcut\.", ".downsample.0."),
)
# nn.Sequential(*resnet.children()): conv1, bn1, relu, maxpool, four stages, avgpool, fc
_FROM_CHILDREN = (
    (r"^0\.", "conv1."),
    (r"^1\.", "bn1."),
    (r"^([4-7])\.", lambda found: f"layer{int(found[1]) - 3}."),
    (r"^(9|10)\.", "fc."),  # with an nn.Flatten before it the tenth
)
_RULES = {"layer1": (), "res2": _FROM_DETECTRON2, "4": _FROM_CHILDREN}
# What torch.compile, FSDP and activation checkpointing put into names, also between a stage and its blocks
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_OTHERS = "others outside the backbone"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """A ResNet in a file of another project.

    `weights` have torchvision's names; `left_out` counts tensors by what they are. Of those outside
    the backbone of which nobody knows what they are `others` has the names. `objects` are the
    classes of what was not read, since that would have run code. `model` is the name of ours with
    these blocks, None where there is none.
    """

    origin: str
    layout: str
    weights: Mapping[str, Tensor]
    left_out: Mapping[str, int]
    others: Sequence[str] = ()
    objects: Sequence[str] = ()

    @property
    def blocks(self) -> tuple[str, tuple[int, ...]]:
        """What kind of blocks, and how many in each stage."""
        kind = "bottleneck" if "layer1.0.conv3.weight" in self.weights else "basic"
        matches = [re.match(r"layer(\d)\.(\d+)\.", name) for name in self.weights]
        places = {(match[1], match[2]) for match in matches if match}
        return kind, tuple(sum(stage == place[0] for place in places) for stage in "1234")

    @property
    def model(self) -> str | None:
        return _MODELS.get(self.blocks)

    def model_or_advice(self) -> str:
        """The model's name. Raises `CheckpointError` where the blocks are those of none of ours."""
        if self.model is None:
            kind, counts = self.blocks
            raise CheckpointError(
                f"{self.origin} holds a ResNet of {'-'.join(map(str, counts))} {kind} blocks, which is none of "
                f"{', '.join(_MODELS.values())}: give another file, or model=NAME to see what does not fit"
            )
        return self.model

    def fitted(self, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights, if they are those of a state dict `wanted`; counters of batches may be missing.

        Raises:
            CheckpointError: tensors that are missing, unknown or of another shape, with their names.
                Unknown are only those below the backbone's own prefix.
        """
        advice = (
            f"Known layouts are {KNOWN}. Give the model it was trained with; what lies outside a checkpoint_prefix is "
            "left out"
        )
        check_fits(wanted, self.weights, f"{self.origin} ({self.layout})", advice)
        return dict(self.weights)

    def __str__(self) -> str:
        told = [f"{count} of {what}" for what, count in self.left_out.items() if what != _OTHERS]
        if self.others:
            told.append(f"{len(self.others)} of {_OTHERS} ({first_of(self.others)})")
        if self.objects:
            told.append(f"objects, which are never made ({first_of(self.objects)})")
        return f"{self.layout}, {len(self.weights)} tensors; left out: {', '.join(told) or 'none'}"


def find(content: Mapping[str, Any], *, origin: str, prefix: str | None = None) -> Found:
    """The one ResNet in `content`, the nested content of a file named `origin` in messages.

    All that lies outside its prefix is left out and told; below it every tensor has to be one of the
    network's, or of a kind that is known to be left out. `prefix` chooses among several backbones:
    all of the dotted name before the weights', or whole parts of it.

    Raises:
        CheckpointError: no ResNet, several, or none with this prefix.
    """
    values = list(leaves(content))
    tensors = _unwrapped({name: value for name, value in values if isinstance(value, Tensor)})
    if not tensors:
        raise CheckpointError(f"{origin} holds no tensors (at its top: {first_of(list(content)) or 'nothing'})")
    objects = list(dict.fromkeys(value.name for _, value in values if isinstance(value, LeftOut)))
    stages = {match["prefix"]: match["stage"] for match in map(_STAGE_1.fullmatch, tensors) if match}
    place = _choose(list(stages), prefix, origin, list(tensors), objects)
    rules = _RULES[stages[place]]
    inside = {_renamed(name.removeprefix(place), rules): name for name in tensors if name.startswith(place)}
    kinds = {name: _kind(name.partition(".")[0]) for name in inside}
    outside = {name: _kind(name) or _OTHERS for name in tensors if not name.startswith(place)}
    return Found(
        origin=origin,
        layout=_layout(content, place, stages[place]),
        weights={ours: tensors[name] for ours, name in inside.items() if not kinds[ours]},
        left_out=Counter(kind for kind in (*kinds.values(), *outside.values()) if kind),
        others=[name for name, kind in outside.items() if kind == _OTHERS],
        objects=objects,
    )


def to_detectron2(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ResNet's weights by detectron2's names, as its converter from torchvision gives them."""
    return {_renamed(name, _TO_DETECTRON2): tensor for name, tensor in weights.items()}


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the names that they have without torch's wrappers, unless two would have the same."""
    found = {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    return found if len(found) == len(tensors) else tensors


def _choose(places: list[str], prefix: str | None, origin: str, names: Sequence[str], objects: Sequence[str]) -> str:
    if not places:
        unread = f" Objects of {first_of(objects)} are not read, as that would run code:" if objects else ""
        unread += " save the model's state_dict() instead of an object." if objects else ""
        raise CheckpointError(
            f"{origin} holds no ResNet by a known layout: its {len(names)} tensors are {first_of(names)}.{unread} "
            f"Known layouts are {KNOWN}"
        )
    named = places if prefix is None else _matching(places, _WRAPPERS.sub("", f"{prefix}.").strip("."))
    if len(named) == 1:
        return named[0]
    there = ", ".join(place.rstrip(".") or "(no prefix)" for place in places)
    example = (places[0] if prefix is None or not named else named[0]).rstrip(".")
    what = f"holds {len(places)} backbones" if named else f"holds no backbone below {prefix}; there are"
    raise CheckpointError(
        f"{origin} {what}: {there}. Name one, such as checkpoint_prefix={example or chr(39) * 2} "
        "(relloc.export: --checkpoint-prefix)"
    )


def _matching(places: list[str], prefix: str) -> list[str]:
    exact = [place for place in places if place.rstrip(".") == prefix]
    return exact or [place for place in places if prefix and f".{prefix}." in f".{place}"]


def _kind(name: str) -> str | None:
    """What the first telling part of a dotted name says that the tensor is, if that is left out."""
    for part in name.split("."):
        for kind, parts in _LEFT_OUT.items():
            if re.fullmatch(parts, part):
                return kind
    return None


def _renamed(name: str, rules: Sequence[tuple[str, Any]]) -> str:
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


def _layout(content: Mapping[str, Any], place: str, stage: str) -> str:
    if stage == "res2":
        return "detectron2's names"
    if "pytorch-lightning_version" in content or "hyper_parameters" in content:
        return f"PyTorch Lightning, {'numbered children' if stage == '4' else 'names'} below {place.rstrip('.')}"
    if stage == "4":
        return f"torchvision's children by their numbers{' below ' if place else ''}{place.rstrip('.')}"
    if place.endswith("_feature_blocks."):
        return "VISSL"
    if place == "state_dict.backbone.":
        return "mmselfsup 1.x" if "message_hub" in content else "mmselfsup 0.x or OpenSelfSup, as trained"
    if place == "state_dict." and set(content) <= {"state_dict", "author", "meta"}:
        return "mmselfsup 0.x or OpenSelfSup, as published"
    return f"torchvision's names below {place.rstrip('.')}" if place else "torchvision or timm"
