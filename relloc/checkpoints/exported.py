"""Writes a ResNet's weights as other projects load them, with the settings that these need."""

import io
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from relloc.checkpoints import layouts

# The layouts that can be written, and the suffixes of their files.
SUFFIXES = {
    "torchvision": (".pth", ".safetensors"),
    "detectron2": (".pkl",),
    "mmdetection": (".pth",),
}
DEPTHS = {"resnet18": 18, "resnet50": 50}
_TORCHVISION = """\
model = torchvision.models.{model}({arguments})
{fc}model.load_state_dict({load})
Images: RGB in 0..1, mean {mean}, standard deviation {std}"""
# Normalization and order of colors as detectron2's tools/convert-torchvision-to-d2.py advises;
# STRIDE_IN_1X1 as in protocols.md 5.1.
_DETECTRON2 = """\
MODEL:
  WEIGHTS: "{file}"
  PIXEL_MEAN: {mean}
  PIXEL_STD: {std}
  RESNETS:
    DEPTH: {depth}
    STRIDE_IN_1X1: False
{width}INPUT:
  FORMAT: "RGB\""""
_MMDETECTION = """\
model = dict(
    data_preprocessor=dict(mean={mean}, std={std}, bgr_to_rgb=True),
    backbone=dict(
        depth={depth},
        style='pytorch',
        init_cfg=dict(type='Pretrained', checkpoint='{file}')))
mmdetection 2.x: img_norm_cfg = dict(mean={mean}, std={std}, to_rgb=True)
C4 detectors, whose head is stage 4: roi_head=dict(shared_head=dict(init_cfg=<the same>))"""

# What gives torchvision's network the strides that a backbone was trained with, by its setting.
_STRIDED = {"resnet18": "conv1", "resnet50": "conv2"}  # beside the shortcut, in the first block
_OWN_STRIDES = {
    "last_stride=1": (
        "model.layer4[0].{strided}.stride = model.layer4[0].downsample[0].stride = (1, 1)"
    ),
    "stem=stride_1": "model.conv1.stride = (1, 1)",
    "stem=no_pool": "model.maxpool = torch.nn.Identity()",
}


def file_content(
    layout: str, suffix: str, weights: Mapping[str, Tensor], classes: int | None
) -> bytes:
    """Returns the bytes of a file of weights for another project.

    Args:
        layout: one of `SUFFIXES`.
        suffix: one of the suffixes of the layout, which decides the format.
        weights: all tensors of a ResNet by torchvision's names.
        classes: torchvision only: add a classifier of zeros for so many classes, if not None.
    """
    if layout == "detectron2":
        renamed = layouts.to_detectron2(weights)
        arrays = {name: tensor.numpy() for name, tensor in renamed.items()}
        # detectron2's loader matches names by their ends if it is told to use heuristics.
        model_zoo_file = {"model": arrays, "__author__": "relloc", "matching_heuristics": True}
        return pickle.dumps(model_zoo_file, protocol=4)
    content: dict[str, Any] = dict(weights)
    if layout == "mmdetection":
        content = {"state_dict": content, "author": "relloc"}
    elif classes is not None:
        # The classifier's inputs are the channels of the last batch norm.
        means = [tensor for name, tensor in weights.items() if name.endswith(".running_mean")]
        n_inputs = means[-1].numel()
        content |= {"fc.weight": torch.zeros(classes, n_inputs), "fc.bias": torch.zeros(classes)}
    if suffix == ".safetensors":
        return safetensors.torch.save(content, metadata={"format": "pt"})
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def advice(
    layout: str,
    file: Path,
    model: str,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    classes: int | None,
) -> str:
    """Returns the settings with which the other project loads a file and normalizes images.

    Args:
        layout: one of `SUFFIXES`.
        file: the file that was written.
        model: one of `DEPTHS`.
        mean: of each color channel, for images with values in 0..1.
        std: as `mean`.
        classes: of the classifier that was added, if one was.
    """
    # The two detection projects feed images with values in 0..255.
    scale = 1 if layout == "torchvision" else 255
    numbers = {
        "file": file,
        "mean": [round(value * scale, 3) for value in mean],
        "std": [round(value * scale, 3) for value in std],
        "depth": DEPTHS[model],
        "model": model,
    }
    if layout == "detectron2":
        # Its default width of stage 1 is that of bottleneck blocks.
        width = "" if model == "resnet50" else "    RES2_OUT_CHANNELS: 64\n"
        return _DETECTRON2.format(**numbers, width=width)
    if layout == "mmdetection":
        return _MMDETECTION.format(**numbers)
    # Without a classifier in the file, torchvision's own is removed before loading.
    arguments = f"num_classes={classes}" if classes else ""
    fc = "" if classes else "model.fc = torch.nn.Identity()\n"
    load = f"torch.load('{file}', weights_only=True)"
    if file.suffix == ".safetensors":
        load = f"safetensors.torch.load_file('{file}')"
    return _TORCHVISION.format(**numbers, arguments=arguments, fc=fc, load=load)


def strides_advice(
    layout: str, model: str, own_strides: str, *, is_recalibrated: bool = False
) -> str:
    """Returns what to know of a file whose network was trained with strides of its own.

    Args:
        layout: one of `SUFFIXES`.
        model: one of `DEPTHS`.
        own_strides: the settings of these strides, such as "last_stride=1 stem=stride_1".
        is_recalibrated: whether batch norm was recalibrated, which is done with standard strides.
    """
    text = (
        f"It was trained with {own_strides}. Strides are not in the file: the network that loads "
        "it has the standard ones, as relloc.evaluate with strides=standard."
    )
    if is_recalibrated:
        return f"{text} The statistics of batch norm were estimated with these, and fit no others."
    if layout != "torchvision":
        return text
    lines = [f"{text} Its own:"]
    for setting in own_strides.split():
        lines.append(_OWN_STRIDES[setting].format(strided=_STRIDED[model]))
    return "\n".join(lines)
