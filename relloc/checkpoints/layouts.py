"""Other projects' names for a ResNet's weights: finding them in a file, to our names and back.

Ours are torchvision's, which mmselfsup, OpenSelfSup, timm and VISSL share below some prefix
(protocols.md 5.1). detectron2 has names of its own.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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
_MODELS = {"2-2-2-2 basic": "resnet18", "3-4-6-3 bottleneck": "resnet50"}
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
# Parts of detectron2's names and of ours, applied in this order; ^ stands before the first part.
_DETECTRON2 = {
    "^stem.conv1.norm.": "^bn1.",
    "^stem.conv1.": "^conv1.",
    "^stem.fc.": "^fc.",  # their converter writes it, too
    "^res2.": "^layer1.",
    "^res3.": "^layer2.",
    "^res4.": "^layer3.",
    "^res5.": "^layer4.",
    ".conv1.norm.": ".bn1.",
    ".conv2.norm.": ".bn2.",
    ".conv3.norm.": ".bn3.",
    ".shortcut.norm.": ".downsample.1.",
    ".shortcut.": ".downsample.0.",
}
# nn.Sequential(*resnet.children()): conv1, bn1, relu, maxpool, four stages, avgpool, fc
_CHILDREN = {
    "^0.": "^conv1.",
    "^1.": "^bn1.",
    "^4.": "^layer1.",
    "^5.": "^layer2.",
    "^6.": "^layer3.",
    "^7.": "^layer4.",
    "^9.": "^fc.",
    "^10.": "^fc.",  # with an nn.Flatten before it
}
_NAMES: Mapping[str, Mapping[str, str]] = {"layer1": {}, "res2": _DETECTRON2, "4": _CHILDREN}
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
    def blocks(self) -> str:
        """How many blocks each stage has, and of what kind: 3-4-6-3 bottleneck."""
        kind = "bottleneck" if "layer1.0.conv3.weight" in self.weights else "basic"
        places = set(re.findall(r"^layer(\d)\.(\d+)\.", "\n".join(self.weights), re.MULTILINE))
        counts = Counter(stage for stage, _ in places)
        return f"{counts['1']}-{counts['2']}-{counts['3']}-{counts['4']} {kind}"

    @property
    def model(self) -> str | None:
        return _MODELS.get(self.blocks)

    def model_or_advice(self) -> str:
        """The model's name. Raises `CheckpointError` where the blocks are those of none of ours."""
        if self.model is None:
            raise CheckpointError(
                f"{self.origin} holds a ResNet of {self.blocks} blocks, which is none of "
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
        raise CheckpointError(
            f"{origin} holds no tensors (at its top: {first_of(list(content)) or 'nothing'})"
        )
    objects = list(dict.fromkeys(value.name for _, value in values if isinstance(value, LeftOut)))
    stages = {
        match["prefix"]: match["stage"] for match in map(_STAGE_1.fullmatch, tensors) if match
    }
    place = _choose(list(stages), prefix, origin, list(tensors), objects)
    parts = _NAMES[stages[place]].items()
    inside = {
        _renamed(name.removeprefix(place), parts): name
        for name in tensors
        if name.startswith(place)
    }
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
    parts = [(ours, theirs) for theirs, ours in _DETECTRON2.items()]
    return {_renamed(name, parts): tensor for name, tensor in weights.items()}


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the names that they have without torch's wrappers, unless two would have the same."""
    found = {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    return found if len(found) == len(tensors) else tensors


def _choose(
    places: list[str], prefix: str | None, origin: str, names: Sequence[str], objects: Sequence[str]
) -> str:
    if not places:
        unread = f"Objects of {first_of(objects)} are not read, as that would run code: save a state_dict(). "
        raise CheckpointError(
            f"{origin} holds no ResNet by a known layout: its {len(names)} tensors are {first_of(names)}. "
            f"{unread if objects else ''}Known layouts are {KNOWN}"
        )
    named = (
        places if prefix is None else _matching(places, _WRAPPERS.sub("", f"{prefix}.").strip("."))
    )
    if len(named) == 1:
        return named[0]
    there = ", ".join(place.rstrip(".") or "(no prefix)" for place in places)
    example = (named or places)[0].rstrip(".") or "''"
    what = f"{len(places)} backbones" if named else f"no backbone below {prefix}; there are"
    raise CheckpointError(
        f"{origin} holds {what}: {there}. Name one, such as checkpoint_prefix={example} "
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


def _renamed(name: str, parts: Iterable[tuple[str, str]]) -> str:
    name = f"^{name}"
    for old, new in parts:
        name = name.replace(old, new)
    return name.removeprefix("^")


def _layout(content: Mapping[str, Any], place: str, stage: str) -> str:
    below = f" below {place.rstrip('.')}" if place else ""
    names = "children by their numbers" if stage == "4" else "names"
    if stage == "res2":
        return "detectron2's names"
    if "pytorch-lightning_version" in content or "hyper_parameters" in content:
        return f"PyTorch Lightning, {names}{below}"
    if place.endswith("_feature_blocks."):
        return "VISSL"
    if place == "state_dict.backbone.":
        return (
            "mmselfsup 1.x"
            if "message_hub" in content
            else "mmselfsup 0.x or OpenSelfSup, as trained"
        )
    if place == "state_dict." and set(content) <= {"state_dict", "author", "meta"}:
        return "mmselfsup 0.x or OpenSelfSup, as published"
    return f"torchvision's {names}{below}" if place or stage == "4" else "torchvision or timm"
