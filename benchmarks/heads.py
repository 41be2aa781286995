"""What more heads cost: one linear head, one a stage, and a grid of 50 more, on a frozen network.

Whole training steps from uint8 images on the device: normalizing, the forward of the frozen
backbone (bfloat16 on a GPU), pooling of the layers that have heads, batch norm, and the steps of
all heads, by the same functions as `python -m relloc.evaluate eval=linear_in1k`. "K at once" is how
many steps heads take together (relloc/evals/heads.py); 1 is SGD step by step. Reading images and
coloring them, which cost all sides alike, are left out, unless --root names images: then one head
and all of them are also trained on the evaluation's random views of these, read by its workers.

What can be reached: 55 heads of ImageNet multiply 1.0 TFLOP a step with TF32, which is 2.5 ms at
the 400 TFLOP/s that one H100 may give, and pass 1.9 GB of weights 14 times in 16 steps, 0.6 ms at
3 TB/s. By that arithmetic they fit into 15 % of the time of one head where a step of 256 images
takes 21 ms or more; the other four poolings come on top.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from features import images_below
from hydra import compose, initialize_config_dir
from report import arguments, median_s, tell
from torch import Tensor

from relloc.errors import UsageError
from relloc.evals.heads import HeadSettings, Sgd
from relloc.evals.linear import Linear
from relloc.evals.training import HeadTraining, draw_held_back
from relloc.features.pool import layer_channels, layer_dims
from relloc.features.source import FeatureBatch, LiveFeatures, encode
from relloc.models.backbone import STAGES, Backbone
from relloc.models.fused_resnet import fused_if_possible
from relloc.runs import build, engine
from relloc.runs.command_settings import Evaluating
from relloc.runs.settings import conf_dir

ONE = ("feature5",)


class Resident:
    """A `FeatureSource` of one batch of random images on the device, encoded again each time."""

    def __init__(self, backbone: Backbone, options: argparse.Namespace, how: engine.Engine) -> None:
        backbone = backbone.eval()
        self.network = fused_if_possible(backbone) if how.fuses else backbone
        self.bf16 = how.bf16
        self.n = options.steps * options.batch
        self.n_classes = options.classes
        self.dims = layer_dims(backbone)
        self.channels = layer_channels(backbone)
        shape = (options.batch, options.px, options.px, 3)
        self.pixels = torch.randint(256, shape, dtype=torch.uint8, device=how.device).permute(
            0, 3, 1, 2
        )
        self.labels = torch.randint(options.classes, (options.batch,), device=how.device)
        self.encode = how.compile(encode)

    def batches(
        self, indices: Tensor, size: int, layers: Sequence[str], epoch: int = 0, epochs: int = 1
    ) -> Iterator[FeatureBatch]:
        for chosen in indices.split(size):
            with torch.no_grad():
                yield (
                    self.encode(self.network, self.pixels[: len(chosen)], tuple(layers), self.bf16),
                    self.labels[: len(chosen)],
                )


class FromFiles:
    """A `FeatureSource` of the evaluation's random views of few images, read again each time."""

    def __init__(
        self,
        backbone: Backbone,
        options: argparse.Namespace,
        config: Evaluating,
        how: engine.Engine,
    ) -> None:
        images = images_below(options.root)
        labels = torch.randint(options.classes, (len(images),))
        of_eval = _linear(config)
        if of_eval.augment is None:
            raise UsageError("eval.linear_in1k.augment is null: give the random views of training")
        reading = config.encode_config(how, shown=False)
        self.live = LiveFeatures(
            backbone, images, reading, of_eval.augment, labels=labels, color=of_eval.color
        )
        self.n = options.steps * options.batch
        self.n_classes = options.classes
        self.dims, self.channels = self.live.dims, self.live.channels

    def batches(
        self, indices: Tensor, size: int, layers: Sequence[str], epoch: int = 0, epochs: int = 1
    ) -> Iterator[FeatureBatch]:
        return self.live.batches(indices % self.live.n, size, layers, epoch)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="resnet50", help="member of conf/model")
    parser.add_argument("--px", type=int, default=224)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument(
        "--steps", type=int, default=160, help="steps that are timed together; a multiple of ten"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--at-once", type=int, nargs="+", default=[16, 1], help="steps that 55 heads take together"
    )
    parser.add_argument(
        "--root", type=Path, help="images, or a folder that relloc.prepare packed: timed as well"
    )
    parser.add_argument(
        "overrides", nargs="*", help="settings such as compile=false or precision=tf32"
    )
    options = parser.parse_args()
    if options.steps % 10:
        parser.error(
            "--steps is to be a multiple of ten: one batch in ten is held back from the grid"
        )
    config = _config([f"model={options.model}", *options.overrides])
    how = engine.resolve_engine(config.engine)
    backbone = build.model_of_conf(options.model).backbone(0)
    how.place(backbone)
    sides = _sides(options)
    rows = _timed(sides, Resident(backbone, options, how), how, options)
    ratios = _over_first(rows)
    if options.root:
        names = list(sides)
        ends = {f"{name}, from files": sides[name] for name in (names[0], names[2])}
        read = _timed(ends, FromFiles(backbone, options, config, how), how, options)
        rows, ratios = rows + read, ratios | _over_first(read)
    tell(
        f"linear heads on frozen {options.model}; {how}",
        rows,
        ratios,
        options.json,
        settings=vars(options),
    )


def _timed(
    sides: dict[str, HeadTraining],
    source: Resident | FromFiles,
    how: engine.Engine,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    passes = {name: _pass(training, source, how.device) for name, training in sides.items()}
    spent = median_s(passes, device=how.device, rounds=options.rounds)
    return [_row(name, sides[name], spent[name] / options.steps, options) for name in sides]


def _over_first(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {
        f"{row['side']}, over {rows[0]['side']}": row["ms a step"] / rows[0]["ms a step"]
        for row in rows[1:]
    }


def _config(overrides: list[str]) -> Evaluating:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        words = [
            "checkpoint=random",
            "data=in1k",
            "data.root=nowhere",
            "eval=linear_in1k",
            *overrides,
        ]
        return build.evaluating(compose("evaluate", words))


def _linear(config: Evaluating) -> Linear:
    (asked,) = config.evaluations
    if not isinstance(asked.evaluation, Linear):
        raise TypeError(f"eval={asked.name} is no linear evaluation")
    return asked.evaluation


def _sides(options: argparse.Namespace) -> dict[str, HeadTraining]:
    constants = _linear(_config([]))
    published = HeadSettings(lr=constants.lr, weight_decay=constants.weight_decay, sees_all=True)
    grid = [
        HeadSettings(lr=lr, weight_decay=decay, sees_all=False)
        for lr in constants.grid_lrs
        for decay in constants.grid_weight_decays
    ]
    most = options.at_once[0]
    few = {
        "one head": _training(ONE, [published], options, most),
        "five": _training(STAGES, [published], options, most),
    }
    name = f"five and {len(grid) * len(STAGES)}"
    many = {
        f"{name}, {k} at once": _training(STAGES, [published, *grid], options, k)
        for k in options.at_once
    }
    return few | many


def _training(
    layers: tuple[str, ...], settings: list[HeadSettings], options: argparse.Namespace, at_once: int
) -> HeadTraining:
    return HeadTraining(
        layers=layers,
        sgd=Sgd(settings=tuple(settings), momentum=0.9, nesterov=True),
        epochs=1,
        milestone_epochs=(),
        gamma=0.1,
        batch=options.batch,
        batch_norm=True,
        steps_at_once=at_once,
    )


def _pass(training: HeadTraining, source: Resident | FromFiles, device: torch.device):
    heads = {
        layer: training._new_heads(source, layer, seed=0).to(device).train()
        for layer in training.layers
    }
    tenth = draw_held_back(source.n, seed=0)
    return lambda: training._train_epoch(heads, source, tenth, 0, device, seed=0)


def _row(
    name: str, training: HeadTraining, seconds: float, options: argparse.Namespace
) -> dict[str, Any]:
    return {
        "side": name,
        "heads": len(training.layers) * len(training.sgd.settings),
        "ms a step": 1000 * seconds,
        "images/s": options.batch / seconds,
    }


if __name__ == "__main__":
    started = time.monotonic()
    main()
    print(f"{time.monotonic() - started:.0f} s in all")
