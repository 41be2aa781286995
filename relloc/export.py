"""python -m relloc.export CHECKPOINT --layout LAYOUT --out FILE: a ResNet's weights as another project loads them."""

import argparse
import io
import pickle
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from relloc import files, terminal
from relloc.checkpoints import backbone_files, layouts, states, weight_files
from relloc.errors import CheckpointError, UsageError
from relloc.models.resnet import ResNetBackbone
from relloc.patches.normalize import IMAGENET_MEAN, IMAGENET_STD

_SUFFIXES = {"torchvision": (".pth", ".safetensors"), "detectron2": (".pkl",), "mmdetection": (".pth",)}
_DEPTHS = {"resnet18": 18, "resnet50": 50}
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the file and print what the other project needs to be told; 0, or 2 after a message."""
    options = _parser().parse_args(arguments)
    try:
        _check(options)
        model, weights = _weights(options.checkpoint, options.checkpoint_prefix)
        _write(options.out, _content(options, weights))
    except UsageError as error:
        terminal.complain(error)
        return error.exit_code
    print(f"{terminal.escaped(str(options.out))}: {model} in {options.layout}'s layout\n\n{_advice(options, model)}\n")
    terminal.tell_next(f"python -m relloc.evaluate {shlex.quote(f'checkpoint={options.out}')} data=NAME")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m relloc.export", description=__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a run folder or any file of weights")
    parser.add_argument("--layout", required=True, choices=_SUFFIXES)
    parser.add_argument("--out", required=True, metavar="FILE", type=Path, help=_suffixes())
    parser.add_argument("--fc", metavar="CLASSES", type=int, help="torchvision: add a classifier of zeros")
    parser.add_argument("--checkpoint-prefix", metavar="PREFIX", help="which backbone, where CHECKPOINT holds several")
    parser.add_argument("--force", action="store_true", help="replace FILE if it is there")
    return parser


def _suffixes() -> str:
    return "; ".join(f"{layout}: {' or '.join(suffixes)}" for layout, suffixes in _SUFFIXES.items())


def _check(options: argparse.Namespace) -> None:
    if options.out.suffix not in _SUFFIXES[options.layout]:
        raise UsageError(f"--out {options.out} has none of the suffixes that tell the format: {_suffixes()}")
    if options.out.exists() and not options.force:
        raise UsageError(f"{options.out} is there already: give another --out, or --force to replace it")
    if options.fc is not None and (options.layout != "torchvision" or options.fc < 1):
        raise UsageError(f"--fc {options.fc}: it takes a number of classes, and only --layout torchvision has it")


def _weights(checkpoint: Path, prefix: str | None) -> tuple[str, dict[str, Tensor]]:
    """Which model it is, and its weights by torchvision's names, all of them."""
    file = backbone_files.backbone_file(checkpoint)
    if not backbone_files.is_ours(file):
        states.check_hash(file)
        found = layouts.find(weight_files.read(file), origin=str(file), prefix=prefix)
        model = found.model_or_advice()
        backbone = ResNetBackbone(depth=_DEPTHS[model])
        backbone_files.fill(backbone, found.fitted(backbone.state_dict()), str(file))
        return model, backbone.state_dict()
    weights, about = backbone_files.load_backbone(file)
    if prefix is not None:
        raise UsageError(f"{file} has no prefixes: leave --checkpoint-prefix out")
    model = backbone_files.model_name(about, file)
    if model not in _DEPTHS:
        raise CheckpointError(
            f"{file} is a {model}, which torchvision, detectron2 and mmdetection do not have: "
            f"only {' and '.join(_DEPTHS)} can be exported"
        )
    backbone = ResNetBackbone(depth=_DEPTHS[model])
    backbone_files.fill(backbone, weights, str(file))
    return model, backbone.state_dict()


def _content(options: argparse.Namespace, weights: Mapping[str, Tensor]) -> bytes:
    if options.layout == "detectron2":
        arrays = {name: tensor.numpy() for name, tensor in layouts.to_detectron2(weights).items()}
        return pickle.dumps({"model": arrays, "__author__": "relloc", "matching_heuristics": True}, protocol=4)
    if options.layout == "mmdetection":
        return _saved({"state_dict": dict(weights), "author": "relloc"})
    weights = {**weights, **_zeros(options.fc, weights)}
    if options.out.suffix == ".safetensors":
        return safetensors.torch.save(weights, metadata={"format": "pt"})
    return _saved(weights)


def _zeros(classes: int | None, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if classes is None:
        return {}
    inputs = [tensor for name, tensor in weights.items() if name.endswith(".running_mean")][-1].numel()
    return {"fc.weight": torch.zeros(classes, inputs), "fc.bias": torch.zeros(classes)}


def _saved(content: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _write(out: Path, content: bytes) -> None:
    try:
        files.write_whole(out, content)
    except OSError as error:
        raise CheckpointError(f"{out} could not be written ({error.strerror})") from error


def _advice(options: argparse.Namespace, model: str) -> str:
    file, scale = options.out.resolve(), 1 if options.layout == "torchvision" else 255
    mean, std = ([round(value * scale, 3) for value in values] for values in (IMAGENET_MEAN, IMAGENET_STD))
    numbers = {"file": file, "mean": mean, "std": std, "depth": _DEPTHS[model], "model": model}
    if options.layout == "detectron2":
        return _DETECTRON2.format(**numbers, width="" if model == "resnet50" else "    RES2_OUT_CHANNELS: 64\n")
    if options.layout == "mmdetection":
        return _MMDETECTION.format(**numbers)
    by_torch, by_safetensors = f"torch.load('{file}', weights_only=True)", f"safetensors.torch.load_file('{file}')"
    return _TORCHVISION.format(
        **numbers,
        arguments=f"num_classes={options.fc}" if options.fc else "",
        fc="" if options.fc else "model.fc = torch.nn.Identity()\n",
        load=by_safetensors if file.suffix == ".safetensors" else by_torch,
    )


if __name__ == "__main__":
    terminal.run_command(main)
