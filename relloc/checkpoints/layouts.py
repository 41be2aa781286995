"""Finds a ResNet in the files of other projects, and translates the names of its weights to ours.

Our names are torchvision's. mmselfsup, OpenSelfSup, timm and VISSL have the same below some prefix
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
from relloc.terminal import quantity

KNOWN = (
    "mmselfsup 0.x and 1.x, OpenSelfSup, torchvision, timm, VISSL, PyTorch Lightning and "
    "detectron2 ResNets, the numbered children of torchvision's in an nn.Sequential, "
    "and state dicts of such names with any prefix"
)
# Blocks of the four stages and their kind, and the name of our model with them.
_MODELS = {"2-2-2-2 basic": "resnet18", "3-4-6-3 bottleneck": "resnet50"}
# How a file names the first convolution of stage 1. From it follow the prefix and the layout.
_STAGE_1 = re.compile(r"(?P<prefix>(?:.*\.)?)(?P<stage>layer1|res2|4)\.0\.conv1\.weight")
# Regular expressions for a part of a dotted name below which no backbone is, by what is there.
_LEFT_OUT = {
    "classifier": r"fc|fc_cls|classifier|last_linear",
    "neck": r"neck|necks",
    "head": r"head|heads|\w+_head",
    "projection or prediction": r"proj|projector|projection|mlp|predictor|prediction|prototypes"
    r"|\w+_projector|\w+_mlp",
    "momentum encoder": r"encoder_k|teacher|target|target_\w+|momentum_\w+|ema|\w+_ema",
    "queue or memory bank": r"queue\w*|memory|memory_bank|feature_bank|center",
    "state of the training": r"optimizer\w*|\w*scheduler\w*|\w*scaler|amp|loss|criterion|meta"
    r"|message_hub|callbacks",
    "input normalization": r"data_preprocessor|pixel_mean|pixel_std",
}
# Parts of detectron2's names and what they are in ours, replaced in this order. A ^ marks the
# beginning of a name. As in detectron2's tools/convert-torchvision-to-d2.py.
_DETECTRON2 = {
    "^stem.conv1.norm.": "^bn1.",
    "^stem.conv1.": "^conv1.",
    "^stem.fc.": "^fc.",  # also written by their converter
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
# nn.Sequential(*resnet.children()) numbers the children: conv1, bn1, relu, maxpool, the four
# stages, avgpool, fc.
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
# By the stage's name that _STAGE_1 found: what to replace in the names.
_NAMES: Mapping[str, Mapping[str, str]] = {"layer1": {}, "res2": _DETECTRON2, "4": _CHILDREN}
# What torch.compile, FSDP and activation checkpointing insert into names, also between a stage and
# its blocks.
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# How tensors are counted that are outside of the backbone and of no known kind.
_OTHERS = "others outside the backbone"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoundResNet:
    """A ResNet that was found in a file of another project.

    Attributes:
        origin: the file, for messages.
        layout: the project or the naming that the file has, in words.
        weights: the backbone's tensors by torchvision's names.
        left_out: how many tensors are not of the backbone, by what they are.
        others: names of tensors outside of the backbone that are of no known kind.
        objects: classes of objects that were not read, since that would run code.
    """

    origin: str
    layout: str
    weights: Mapping[str, Tensor]
    left_out: Mapping[str, int]
    others: Sequence[str] = ()
    objects: Sequence[str] = ()

    @property
    def blocks(self) -> str:
        """The number of blocks of each stage, and their kind, such as "3-4-6-3 bottleneck"."""
        kind = "bottleneck" if "layer1.0.conv3.weight" in self.weights else "basic"
        # Each block has several tensors, hence the set.
        all_names = "\n".join(self.weights)
        stages_and_blocks = set(re.findall(r"^layer(\d)\.(\d+)\.", all_names, re.MULTILINE))
        counts = Counter(stage for stage, _ in stages_and_blocks)
        return f"{counts['1']}-{counts['2']}-{counts['3']}-{counts['4']} {kind}"

    @property
    def model(self) -> str | None:
        """The name of our model with these blocks, or None if we have none."""
        return _MODELS.get(self.blocks)

    def model_or_advice(self) -> str:
        """Returns the name of our model with these blocks.

        Raises:
            CheckpointError: we have no such model; the message says what to do.
        """
        if self.model is None:
            raise CheckpointError(
                f"{self.origin} holds a ResNet of {self.blocks} blocks, which is none of "
                f"{', '.join(_MODELS.values())}: "
                "give another file, or model=NAME to see what does not fit"
            )
        return self.model

    def fitted(self, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the weights after checking that they are those of a backbone.

        Args:
            wanted: the backbone's state dict, which may be on the meta device. Batch norm's
                counters may be missing in the weights.

        Raises:
            CheckpointError: tensors are missing, unknown or of another shape; the message names
                them. Only tensors below the backbone's own prefix count as unknown.
        """
        advice = (
            f"Known layouts are {KNOWN}. Give the model it was trained with; "
            "what lies outside a checkpoint_prefix is left out"
        )
        check_fits(wanted, self.weights, f"{self.origin} ({self.layout})", advice)
        return dict(self.weights)

    def __str__(self) -> str:
        parts = [f"{count} of {kind}" for kind, count in self.left_out.items() if kind != _OTHERS]
        if self.others:
            parts.append(f"{len(self.others)} of {_OTHERS} ({first_of(self.others)})")
        if self.objects:
            parts.append(f"objects, which are never made ({first_of(self.objects)})")
        left_out = ", ".join(parts) or "none"
        return f"{self.layout}, {quantity(len(self.weights), 'tensor')}; left out: {left_out}"


def find(content: Mapping[str, Any], *, origin: str, prefix: str | None = None) -> FoundResNet:
    """Finds the one ResNet in the content of a file.

    Tensors outside of its prefix are left out and counted. Below the prefix every tensor has to be
    one of the network's, or of a kind that is known to be left out, such as a classifier.

    Example: `find(weight_files.read(file), origin=str(file)).weights["conv1.weight"]`

    Args:
        content: the nested content of the file, as `weight_files.read` returns it.
        origin: the name of the file, for messages.
        prefix: chooses among several backbones. It is everything that stands before a weight's
            name, or one or more whole parts of that.

    Raises:
        CheckpointError: there is no ResNet, or several, or none with this prefix.
    """
    values = list(leaves(content))
    tensors = {name: value for name, value in values if isinstance(value, Tensor)}
    tensors = _without_wrappers(tensors)
    if not tensors:
        raise CheckpointError(
            f"{origin} holds no tensors (at its top: {first_of(list(content)) or 'nothing'})"
        )
    object_names = [value.name for _, value in values if isinstance(value, LeftOut)]
    objects = list(dict.fromkeys(object_names))  # each once, in order

    # Every backbone in the file has a first stage; what stands before its name is its prefix.
    stages: dict[str, str] = {}
    for name in tensors:
        match = _STAGE_1.fullmatch(name)
        if match:
            stages[match["prefix"]] = match["stage"]
    own_prefix = _choose(list(stages), prefix, origin, list(tensors), objects)
    stage = stages[own_prefix]

    # Below the prefix: our names of the tensors, and their names in the file.
    replacements = _NAMES[stage].items()
    names_in_file: dict[str, str] = {}
    for name in tensors:
        if name.startswith(own_prefix):
            our_name = _renamed(name.removeprefix(own_prefix), replacements)
            names_in_file[our_name] = name

    # A kind is what the tensor is if it is left out, such as a classifier; None is the backbone.
    inside = {name: _kind(name.partition(".")[0]) for name in names_in_file}
    outside = {name: _kind(name) or _OTHERS for name in tensors if not name.startswith(own_prefix)}
    left_out = [kind for kind in (*inside.values(), *outside.values()) if kind]
    return FoundResNet(
        origin=origin,
        layout=_layout(content, own_prefix, stage),
        weights={
            our_name: tensors[name]
            for our_name, name in names_in_file.items()
            if not inside[our_name]
        },
        left_out=Counter(left_out),
        others=[name for name, kind in outside.items() if kind == _OTHERS],
        objects=objects,
    )


def to_detectron2(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a ResNet's weights by detectron2's names, as its converter from torchvision does."""
    replacements = [(ours, theirs) for theirs, ours in _DETECTRON2.items()]
    return {_renamed(name, replacements): tensor for name, tensor in weights.items()}


def _without_wrappers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Removes what torch's wrappers insert into names, unless two names would become the same."""
    renamed = {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    return renamed if len(renamed) == len(tensors) else tensors


def _choose(
    prefixes: list[str],
    wanted: str | None,
    origin: str,
    names: Sequence[str],
    objects: Sequence[str],
) -> str:
    """Returns the one of the backbones' `prefixes` that the user wants.

    Raises:
        CheckpointError: there is none, or more than one is possible.
    """
    if not prefixes:
        about_objects = ""
        if objects:
            about_objects = (
                f"Objects of {first_of(objects)} are not read, as that would run code: "
                "save a state_dict(). "
            )
        raise CheckpointError(
            f"{origin} holds no ResNet by a known layout: "
            f"its {len(names)} tensors are {first_of(names)}. "
            f"{about_objects}Known layouts are {KNOWN}"
        )
    matching = prefixes
    if wanted is not None:
        # The user may write the prefix as the file does, with wrappers, or with a dot at its end.
        matching = _matching(prefixes, _WRAPPERS.sub("", f"{wanted}.").strip("."))
    if len(matching) == 1:
        return matching[0]
    shown = ", ".join(prefix.rstrip(".") or "(no prefix)" for prefix in prefixes)
    example = (matching or prefixes)[0].rstrip(".") or "''"
    problem = f"{len(prefixes)} backbones"
    if not matching:
        problem = f"no backbone below {wanted}; there are"
    raise CheckpointError(
        f"{origin} holds {problem}: {shown}. Name one, such as checkpoint_prefix={example} "
        "(relloc.export: --checkpoint-prefix)"
    )


def _matching(prefixes: list[str], wanted: str) -> list[str]:
    """Returns the prefixes equal to `wanted`, or if none is, those with it among their parts."""
    exact = [prefix for prefix in prefixes if prefix.rstrip(".") == wanted]
    if exact or not wanted:
        return exact
    return [prefix for prefix in prefixes if f".{wanted}." in f".{prefix}"]


def _kind(name: str) -> str | None:
    """Returns what a tensor is by its dotted name if it is to be left out, or else None."""
    for part in name.split("."):
        for kind, parts in _LEFT_OUT.items():
            if re.fullmatch(parts, part):
                return kind
    return None


def _renamed(name: str, replacements: Iterable[tuple[str, str]]) -> str:
    """Returns a name after replacing parts of it, where ^ stands for its beginning."""
    name = f"^{name}"
    for old, new in replacements:
        name = name.replace(old, new)
    return name.removeprefix("^")


def _layout(content: Mapping[str, Any], prefix: str, stage: str) -> str:
    """Returns in words which project wrote a file, as far as names and other entries tell."""
    below = f" below {prefix.rstrip('.')}" if prefix else ""
    names = "children by their numbers" if stage == "4" else "names"
    if stage == "res2":
        return "detectron2's names"
    if "pytorch-lightning_version" in content or "hyper_parameters" in content:
        return f"PyTorch Lightning, {names}{below}"
    if prefix.endswith("_feature_blocks."):
        return "VISSL"
    if prefix == "state_dict.backbone.":
        # mmselfsup 1.x saves with mmengine, whose checkpoints have a message_hub.
        if "message_hub" in content:
            return "mmselfsup 1.x"
        return "mmselfsup 0.x or OpenSelfSup, as trained"
    if prefix == "state_dict." and set(content) <= {"state_dict", "author", "meta"}:
        return "mmselfsup 0.x or OpenSelfSup, as published"
    if prefix or stage == "4":
        return f"torchvision's {names}{below}"
    return "torchvision or timm"
