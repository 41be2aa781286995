"""`label_free` of a ResNet-50: images a second and memory of its five measures, in parts and whole.

Sides are the spectra alone (RankMe, stable rank, alpha-ReQ), these with LiDAR, with DSE, and all
five, each from reading images to the last number. A first pass over few images, in which kernels
are chosen and compiled, is not counted. Images are noise of 320 x 256 px that is made as it is
read, or with --root those of a folder or of one that relloc.prepare packed.

Memory of the device is the peak of each side. Memory of the host is the peak of the process so far,
so that a side shows it only where it takes more than those before it.
"""

import argparse
import dataclasses
import resource
import tempfile
from pathlib import Path

import numpy as np
import torch
from features import images_below
from hydra import compose, initialize_config_dir
from PIL import Image
from report import arguments, once_s, tell

from relloc.data.image_set import ImageSet, Splits, hash_lines
from relloc.evals.label_free import LabelFree
from relloc.evaluation.contract import Context, NullState
from relloc.features.source import LiveFeatures
from relloc.runs import build, engine
from relloc.runs.evaluated_models import evaluated_models
from relloc.runs.settings import conf_dir

_WIDTH, _HEIGHT = 320, 256
# Images of the pass that is not counted: as many full batches as a first pass needs, and a group
_FEW = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noise:
    """`n` images of noise without labels, an `ImageSet`."""

    n: int
    name: str = "noise"
    split: str = "val"
    labels: None = None
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.n

    def read(self, index: int) -> Image.Image:
        pixels = np.random.default_rng(index).integers(256, size=(_HEIGHT, _WIDTH, 3))
        return Image.fromarray(pixels.astype(np.uint8))

    def source(self, index: int) -> str:
        return str(index)

    def digest(self) -> str:
        return hash_lines([self.name, str(self.n)])


def main() -> None:
    options = _options()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        words = ["checkpoint=random", f"model={options.model}", "eval=label_free"]
        config = build.evaluating(compose("evaluate", [*words, *options.overrides]))
    how = engine.resolve_engine(config.engine)
    evaluation = config.evaluations[0].evaluation
    if not isinstance(evaluation, LabelFree):
        raise SystemExit("give no other eval= than label_free")
    n_images = options.images or (4096 if how.device.type == "cuda" else 64)
    evaluation = dataclasses.replace(evaluation, n_images=n_images)
    backbone = evaluated_models(config)[0].backbone.eval()
    how.place(backbone)
    images: ImageSet = images_below(options.root) if options.root else Noise(n=n_images)
    encode_config = config.encode_config(how)
    source = LiveFeatures(
        backbone,
        images,
        encode_config,
        evaluation.view,
        labels=torch.zeros(len(images), dtype=torch.int64),
    )
    context = Context(
        backbone=backbone,
        splits=Splits(train=images, held_out=images),
        train=source,
        held_out=source,
        encode_config=encode_config,
        seed=0,
        state=NullState(),
        folder=Path(),
    )
    with engine.training(how), tempfile.TemporaryDirectory() as folder:
        # The evaluation leaves a table and a picture
        context = dataclasses.replace(context, folder=Path(folder))
        few = dataclasses.replace(evaluation, n_images=min(n_images, _FEW))
        _measured(few, context)
        rows = []
        for side, changed in _sides(evaluation).items():
            rows.append(_row(side, changed, context, min(n_images, len(images))))
    seconds = {row["side"]: row["s"] for row in rows}
    ratios = {}
    for side, spent in seconds.items():
        if side != "spectra":
            ratios[f"{side}, time over the spectra alone"] = spent / seconds["spectra"]
    title = f"label_free of {options.model}, {min(n_images, len(images))} images; {how}"
    tell(title, rows, ratios, options.json, settings=vars(options))


def _options() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--images", type=int, help="default: 4096 on a GPU, 64 on a CPU")
    parser.add_argument("--root", type=Path, help="a folder of images, in place of noise")
    parser.add_argument(
        "overrides",
        nargs="*",
        help="settings of relloc.evaluate, such as compile=false eval.label_free.dse.n_images=256",
    )
    return parser.parse_args()


def _sides(evaluation: LabelFree) -> dict[str, LabelFree]:
    return {
        "spectra": dataclasses.replace(evaluation, lidar=None, dse=None),
        "with LiDAR": dataclasses.replace(evaluation, dse=None),
        "with DSE": dataclasses.replace(evaluation, lidar=None),
        "all five": evaluation,
    }


def _measured(evaluation: LabelFree, context: Context) -> int:
    """Returns the number of scores."""
    return len(list(evaluation.run(context)))


def _row(side: str, evaluation: LabelFree, context: Context, n: int) -> dict[str, object]:
    device = context.device
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    seconds = once_s(lambda: _measured(evaluation, context), device)
    return {
        "side": side,
        "s": seconds,
        "images/s": n / seconds,
        "device peak GB": torch.cuda.max_memory_allocated(device) / 1e9 if on_gpu else None,
        # Linux counts it in KiB
        "host peak GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }


if __name__ == "__main__":
    main()
