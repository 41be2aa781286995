"""A ResNet's weights in the files that other projects load, and what these need to be told."""

import io
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from relloc.checkpoints import layouts

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
# As detectron2's tools/convert-torchvision-to-d2.py advises; STRIDE_IN_1X1 as protocols.md 5.1.
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
    backbone=dict(depth={depth}, style='pytorch', init_cfg=dict(type='Pretrained', checkpoint='{file}')))
mmdetection 2.x: img_norm_cfg = dict(mean={mean}, std={std}, to_rgb=True)
C4 detectors, whose head is stage 4: roi_head=dict(shared_head=dict(init_cfg=<the same>))"""


def file_content(
    layout: str, suffix: str, weights: Mapping[str, Tensor], classes: int | None
) -> bytes:
    """The file of a `layout` of `SUFFIXES`, with a classifier of zeros for `classes` if asked.

    Args:
        suffix: one of those of the layout.
        weights: by torchvision's names, all of them.
    """
    if layout == "detectron2":
        arrays = {name: tensor.numpy() for name, tensor in layouts.to_detectron2(weights).items()}
        return pickle.dumps(
            {"model": arrays, "__author__": "relloc", "matching_heuristics": True}, protocol=4
        )
    content: dict[str, Any] = dict(weights)
    if layout == "mmdetection":
        content = {"state_dict": content, "author": "relloc"}
    elif classes is not None:
        inputs = [tensor for name, tensor in weights.items() if name.endswith(".running_mean")][
            -1
        ].numel()
        content |= {"fc.weight": torch.zeros(classes, inputs), "fc.bias": torch.zeros(classes)}
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
    """What to tell the other project; `mean` and `std` are of images in 0..1."""
    scale = 1 if layout == "torchvision" else 255
    numbers = {
        "file": file,
        "mean": [round(value * scale, 3) for value in mean],
        "std": [round(value * scale, 3) for value in std],
        "depth": DEPTHS[model],
        "model": model,
    }
    if layout == "detectron2":
        return _DETECTRON2.format(
            **numbers, width="" if model == "resnet50" else "    RES2_OUT_CHANNELS: 64\n"
        )
    if layout == "mmdetection":
        return _MMDETECTION.format(**numbers)
    by_torch, by_safetensors = (
        f"torch.load('{file}', weights_only=True)",
        f"safetensors.torch.load_file('{file}')",
    )
    return _TORCHVISION.format(
        **numbers,
        arguments=f"num_classes={classes}" if classes else "",
        fc="" if classes else "model.fc = torch.nn.Identity()\n",
        load=by_safetensors if file.suffix == ".safetensors" else by_torch,
    )
