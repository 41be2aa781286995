"""python -m relloc.export CHECKPOINT ...: writes a ResNet's weights for other libraries.

python -m relloc.export CHECKPOINT --layout LAYOUT --out FILE, where LAYOUT says which library loads
the file: torchvision, detectron2 or mmdetection. Pretraining leaves batch norm with statistics of
patches: --recalibrate IMAGES estimates them again on whole images, without labels.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from relloc import files, terminal
from relloc.checkpoints import backbone_files, layouts, weight_files
from relloc.checkpoints.exported import DEPTHS, SUFFIXES, advice, file_content, strides_advice
from relloc.checkpoints.fitting import fill
from relloc.checkpoints.hashed_files import check_hash
from relloc.errors import CheckpointError, UsageError
from relloc.models.backbone import Backbone
from relloc.models.described import described_backbone
from relloc.models.resnet import ResNetBackbone
from relloc.patches.normalize import IMAGENET_MEAN, IMAGENET_STD
from relloc.runs.engine import resolve_engine
from relloc.runs.recalibrating import ENTRY, Recalibration, settings_of_words
from relloc.runs.run_settings import RunSettings
from relloc.terminal import quantity
from relloc.tracking.unfinished import unfinished_training


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the file, and prints the settings that the other project needs.

    Returns:
        The exit code: 0, or 2 after a message about a mistake.
    """
    options = parser().parse_args(arguments)
    layout = options.layout
    out = options.out
    classes = options.fc
    # Everything is computed before the file is opened, and the file is replaced as a whole: after
    # any mistake a file that was there before is unchanged.
    try:
        _check(options)
        calibration = settings_of_words(options.recalibrate) if options.recalibrate else None
        model, backbone, is_recalibrated = _loaded(options.checkpoint, options.checkpoint_prefix)
        own_strides = backbone.own_strides
        statistics = "as in the checkpoint"
        if calibration:
            backbone, statistics = _recalibrated(backbone, calibration)
            is_recalibrated = True
        content = file_content(layout, out.suffix, backbone.state_dict(), classes)
        files.write_whole(out, content)
    except UsageError as error:
        terminal.print_error(error)
        return error.exit_code
    except OSError as error:
        terminal.print_error(f"{out} could not be written ({error.strerror})")
        return CheckpointError.exit_code
    # The path is absolute in there, since the other project may be started from another folder.
    settings = advice(
        layout,
        out.resolve(),
        model,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        classes=classes,
    )
    file_name = terminal.escaped(str(out))
    print(f"{file_name}: {model} in {layout}'s layout\n\n{settings}\n")
    if own_strides:
        about_strides = strides_advice(layout, model, own_strides, is_recalibrated=is_recalibrated)
        print(f"{about_strides}\n")
    print(f"Statistics of batch norm: {terminal.escaped(statistics)}\n")
    # The file can be evaluated like any other, which is the quickest check that it is right.
    checkpoint = shlex.quote(f"checkpoint={out}")
    terminal.print_next(f"python -m relloc.evaluate {checkpoint} data=NAME")
    return 0


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    command_line = argparse.ArgumentParser(
        prog="python -m relloc.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command_line.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        type=Path,
        help="a run folder or any file of weights",
    )
    command_line.add_argument("--layout", required=True, choices=SUFFIXES)
    command_line.add_argument("--out", required=True, metavar="FILE", type=Path, help=_suffixes())
    command_line.add_argument(
        "--fc", metavar="CLASSES", type=int, help="torchvision: add a classifier of zeros"
    )
    command_line.add_argument(
        "--checkpoint-prefix",
        metavar="PREFIX",
        help="the backbone to export, if CHECKPOINT holds several",
    )
    command_line.add_argument(
        "--recalibrate",
        nargs="+",
        metavar=("IMAGES", "SETTING"),
        help="re-estimate the statistics of batch norm on whole images: a folder of them or a data "
        "set of conf/data, and settings of relloc.evaluate, such as data.root=FOLDER or "
        "calibration_images=1000",
    )
    command_line.add_argument("--force", action="store_true", help="replace FILE if it exists")
    return command_line


def _suffixes() -> str:
    """Returns the suffixes of each layout as text, for the help and for messages."""
    of_layouts = []
    for layout, suffixes in SUFFIXES.items():
        of_layouts.append(f"{layout}: {' or '.join(suffixes)}")
    return "; ".join(of_layouts)


def _check(options: argparse.Namespace) -> None:
    """Raises `UsageError` for options that can't be used together, before anything is read."""
    if options.out.suffix not in SUFFIXES[options.layout]:
        raise UsageError(
            f"--out {options.out} has none of the suffixes that tell the format: {_suffixes()}. "
            f"Give a name with one of those of {options.layout}"
        )
    # Files of weights are often the only copy: none is replaced unasked.
    if options.out.exists() and not options.force:
        raise UsageError(
            f"{options.out} is there already: give another --out, or --force to replace it"
        )
    # Detectors take a backbone without a classifier.
    if options.fc is not None and (options.layout != "torchvision" or options.fc < 1):
        raise UsageError(
            f"--fc {options.fc}: it takes a number of classes, and only with --layout torchvision"
        )


def _recalibrated(backbone: ResNetBackbone, settings: RunSettings) -> tuple[Backbone, str]:
    """Returns the backbone with statistics of whole images, and in words of which.

    Raises:
        UsageError, DataError: images can't be read, or batches are too small.
    """
    images = settings.data.read().train
    recalibration = Recalibration(backbone=backbone, images=images, settings=settings)
    recalibrated, about = recalibration.run(resolve_engine(settings.engine))
    n_images = quantity(about["images"], "image")
    return recalibrated, f"of {n_images} of {images.name} {images.split}, {settings.view}"


def _loaded(checkpoint: Path, prefix: str | None) -> tuple[str, ResNetBackbone, bool]:
    """Returns the model's name, its backbone with the weights, and whether relloc recalibrated it.

    Raises:
        CheckpointError: the checkpoint can't be read or is no ResNet that can be exported.
        UsageError: a prefix was given for a file that has none.
    """
    # A run that has not ended has no final weights yet.
    unfinished = unfinished_training(checkpoint)
    if unfinished:
        raise CheckpointError(unfinished)
    file = backbone_files.backbone_file(checkpoint)
    is_recalibrated = False
    if backbone_files.is_ours(file):
        model, backbone, weights, is_recalibrated = _from_our_file(file, prefix)
    else:
        # In a file of another project, the names of the weights tell which ResNet it is.
        check_hash(file)
        content = weight_files.read(file)
        found = layouts.find(content, origin=str(file), prefix=prefix)
        model = found.model_or_advice()
        backbone = ResNetBackbone(depth=DEPTHS[model])
        weights = found.fitted(backbone.state_dict())
    # Loading the weights into a backbone checks them, and adds counters that old files lack.
    fill(backbone, weights, str(file))
    return model, backbone, is_recalibrated


def _from_our_file(
    file: Path, prefix: str | None
) -> tuple[str, ResNetBackbone, dict[str, Tensor], bool]:
    """Returns what a file that relloc wrote holds.

    It is the model's name, an empty backbone, the weights, and whether batch norm was recalibrated.
    """
    weights, about = backbone_files.load_backbone(file)
    # Our files have one backbone, whose names have no prefix.
    if prefix is not None:
        raise UsageError(f"{file} has no prefixes: leave --checkpoint-prefix out")
    model = backbone_files.model_name(about, file)
    backbone = None
    if model in DEPTHS:
        backbone = ResNetBackbone(depth=DEPTHS[model])
        if "backbone" in about["model"]:
            backbone = described_backbone(about["model"], weights, str(file))
    # Only ResNets of standard width have names and layouts that the other projects share.
    if not isinstance(backbone, ResNetBackbone) or backbone.size:
        kind = f"{model} {backbone.size}" if backbone else model
        raise CheckpointError(
            f"{file} is a {kind}, which torchvision, detectron2 and mmdetection do not have: "
            f"only {' and '.join(DEPTHS)} of standard width can be exported"
        )
    return model, backbone, weights, ENTRY in about


if __name__ == "__main__":
    terminal.run_command(main)
