"""python -m relloc.export CHECKPOINT --layout LAYOUT --out FILE: a ResNet's weights as another project loads them."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from relloc import files, terminal
from relloc.checkpoints import backbone_files, layouts, weight_files
from relloc.checkpoints.exported import DEPTHS, SUFFIXES, advice, file_content
from relloc.checkpoints.fitting import fill
from relloc.checkpoints.hashed_files import check_hash
from relloc.errors import CheckpointError, UsageError
from relloc.models.resnet import ResNetBackbone
from relloc.patches.normalize import IMAGENET_MEAN, IMAGENET_STD
from relloc.tracking.unfinished import unfinished_training


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the file and print what the other project needs to be told; 0, or 2 after a message."""
    options = parser().parse_args(arguments)
    layout, out, classes = options.layout, options.out, options.fc
    try:
        _check(options)
        model, weights = _weights(options.checkpoint, options.checkpoint_prefix)
        files.write_whole(out, file_content(layout, out.suffix, weights, classes))
    except UsageError as error:
        terminal.complain(error)
        return error.exit_code
    except OSError as error:
        terminal.complain(f"{out} could not be written ({error.strerror})")
        return CheckpointError.exit_code
    words = advice(
        layout, out.resolve(), model, mean=IMAGENET_MEAN, std=IMAGENET_STD, classes=classes
    )
    print(f"{terminal.escaped(str(out))}: {model} in {layout}'s layout\n\n{words}\n")
    terminal.tell_next(f"python -m relloc.evaluate {shlex.quote(f'checkpoint={out}')} data=NAME")
    return 0


def parser() -> argparse.ArgumentParser:
    """The words that the command takes."""
    words = argparse.ArgumentParser(prog="python -m relloc.export", description=__doc__)
    words.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=Path, help="a run folder or any file of weights"
    )
    words.add_argument("--layout", required=True, choices=SUFFIXES)
    words.add_argument("--out", required=True, metavar="FILE", type=Path, help=_suffixes())
    words.add_argument(
        "--fc", metavar="CLASSES", type=int, help="torchvision: add a classifier of zeros"
    )
    words.add_argument(
        "--checkpoint-prefix",
        metavar="PREFIX",
        help="which backbone, where CHECKPOINT holds several",
    )
    words.add_argument("--force", action="store_true", help="replace FILE if it is there")
    return words


def _suffixes() -> str:
    return "; ".join(f"{layout}: {' or '.join(suffixes)}" for layout, suffixes in SUFFIXES.items())


def _check(options: argparse.Namespace) -> None:
    if options.out.suffix not in SUFFIXES[options.layout]:
        raise UsageError(
            f"--out {options.out} has none of the suffixes that tell the format: {_suffixes()}"
        )
    if options.out.exists() and not options.force:
        raise UsageError(
            f"{options.out} is there already: give another --out, or --force to replace it"
        )
    if options.fc is not None and (options.layout != "torchvision" or options.fc < 1):
        raise UsageError(
            f"--fc {options.fc}: it takes a number of classes, and only --layout torchvision has it"
        )


def _weights(checkpoint: Path, prefix: str | None) -> tuple[str, dict[str, Tensor]]:
    """Which model it is, and its weights by torchvision's names, all of them."""
    if unfinished := unfinished_training(checkpoint):
        raise CheckpointError(unfinished)
    file = backbone_files.backbone_file(checkpoint)
    found = None
    if backbone_files.is_ours(file):
        weights, about = backbone_files.load_backbone(file)
        if prefix is not None:
            raise UsageError(f"{file} has no prefixes: leave --checkpoint-prefix out")
        model = backbone_files.model_name(about, file)
        if model not in DEPTHS:
            raise CheckpointError(
                f"{file} is a {model}, which torchvision, detectron2 and mmdetection do not have: "
                f"only {' and '.join(DEPTHS)} can be exported"
            )
    else:
        check_hash(file)
        found = layouts.find(weight_files.read(file), origin=str(file), prefix=prefix)
        weights, model = found.weights, found.model_or_advice()
    backbone = ResNetBackbone(depth=DEPTHS[model])
    fill(backbone, found.fitted(backbone.state_dict()) if found else weights, str(file))
    return model, backbone.state_dict()


if __name__ == "__main__":
    terminal.run_command(main)
