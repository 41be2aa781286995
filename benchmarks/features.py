"""Frozen ResNet-50 features beside the bare forward of torchvision's resnet50, in turns.

The forward: torchvision's own module with its classifier, from normalized images on the device,
nothing kept. Ours: from uint8 images on the device, normalized, encoded, and all six layers pooled
to float32, by the functions that `relloc.features` has for it; the same with avgpool alone; and
with --root from files or shards through the loader. All sides have the precision, memory format
and compilation that `python -m relloc.evaluate` settles on here.
"""

import argparse
import itertools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from report import arguments, median_s, tell
from torch import Tensor
from torchvision.models import resnet50

from relloc.data.folder import FolderImages
from relloc.data.image_set import ImageSet
from relloc.data.images import SUFFIXES
from relloc.data.shards import shards
from relloc.data.views import Center
from relloc.features.source import EncodeConfig, encode
from relloc.models.fused_resnet import fused_if_possible
from relloc.models.resnet import ResNetBackbone
from relloc.results import LAYERS
from relloc.runs import build, engine
from relloc.runs.command_settings import Evaluating
from relloc.runs.settings import conf_dir

CROP_PX, SHORT_PX = 224, 256
WARM_UP = 5  # batches from files that are not counted: workers start, and have some ready
Encode = Callable[[Tensor], dict[str, Tensor]]


def main() -> None:
    options = _options()
    config = _config(options.overrides)
    how = engine.resolve_engine(config.engine)
    on_gpu = how.device.type == "cuda"
    size = options.images or (256 if on_gpu else 8)
    calls = options.calls or (20 if on_gpu else 1)
    reading = EncodeConfig(
        batch=size,
        workers=how.workers,
        device=how.device,
        precision=how.precision,
        unreadable_share=1.0,
        decode=config.decode,
    )
    backbone = ResNetBackbone(depth=50).eval()
    how.place(backbone)
    pixels = torch.randint(
        256, (size, CROP_PX, CROP_PX, 3), dtype=torch.uint8, device=how.device
    ).permute(0, 3, 1, 2)
    six, one = (_encode(how, backbone, layers) for layers in (LAYERS, ("avgpool",)))
    sides = {
        "forward alone": _forward(how, reading.to_device(pixels)),
        "features, six layers": lambda: six(pixels),
        "features, avgpool": lambda: one(pixels),
    }
    with engine.training(how), torch.no_grad():
        repeated = {name: _repeated(work, calls) for name, work in sides.items()}
        seconds = median_s(repeated, device=how.device, rounds=options.rounds, warm_up=3)
        rates = {name: calls * size / spent for name, spent in seconds.items()}
        if options.root:
            rates["features, six layers, from files"] = _from_files(reading, six, options)
    _tell(rates, f"features of ResNet-50 at {CROP_PX} px, {size} images at once; {how}", options)


def _options() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--images", type=int, help="at once; default: 256 on a GPU, 8 on a CPU")
    parser.add_argument(
        "--calls", type=int, help="of the network between two looks at the clock; default: 20, or 1"
    )
    parser.add_argument("--rounds", type=int, default=9, help="how often each side is timed")
    parser.add_argument(
        "--root", type=Path, help="images, or a folder that relloc.prepare packed: timed as well"
    )
    parser.add_argument(
        "--batches", type=int, default=80, help="of them that are timed; few images are repeated"
    )
    parser.add_argument(
        "overrides", nargs="*", help="settings of relloc.evaluate, such as compile=false workers=8"
    )
    return parser.parse_args()


def _config(overrides: Sequence[str]) -> Evaluating:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return build.evaluating(
            compose("evaluate", ["checkpoint=random", "model=resnet50", *overrides])
        )


def _repeated(work: Callable[[], object], calls: int) -> Callable[[], object]:
    return lambda: [work() for _ in range(calls)]


def _forward(how: engine.Engine, images: Tensor) -> Callable[[], object]:
    network = resnet50().eval()
    how.place(network)
    compiled = how.compile(network)

    def forward() -> Tensor:
        with torch.autocast(how.device.type, torch.bfloat16, enabled=how.bf16):
            return compiled(images)

    return forward


def _encode(how: engine.Engine, backbone: ResNetBackbone, layers: tuple[str, ...]) -> Encode:
    """What `LiveFeatures` does with a batch, as one function."""

    network = fused_if_possible(backbone) if how.fuses else backbone
    compiled = how.compile(encode)
    return lambda pixels: compiled(
        network, pixels.to(how.device, non_blocking=True), layers, how.bf16
    )


def _from_files(reading: EncodeConfig, encode: Encode, options: argparse.Namespace) -> float:
    """Images a second between the ends of the first and last counted batch; features not copied."""
    images = images_below(options.root)
    n_images = (WARM_UP + options.batches) * reading.batch
    keys = [(place, 0) for place in itertools.islice(itertools.cycle(range(len(images))), n_images)]
    started, counted = 0.0, 0
    for number, views in enumerate(
        reading.views(images, Center(short_px=SHORT_PX, crop_px=CROP_PX), keys, reading.batch),
        start=1,
    ):
        if len(views.pixels) == reading.batch:  # another size would be compiled anew
            encode(views.pixels)
            counted += reading.batch
        if number in (WARM_UP, WARM_UP + options.batches):
            _finish(reading.device)
            if number == WARM_UP:
                started, counted = time.perf_counter(), 0
    return counted / (time.perf_counter() - started)


def images_below(root: Path) -> ImageSet:
    """The training images of a folder that relloc.prepare packed, or all images below another."""
    if (root / "manifest.json").is_file():
        return shards(root=str(root)).train
    found = sorted(
        os.path.join(parent, name)
        for parent, _, names in os.walk(root)
        for name in names
        if name.lower().endswith(SUFFIXES)
    )
    if not found:
        raise SystemExit(f"{root} holds no images")
    return FolderImages(name=root.name, split="all", paths=found)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _tell(rates: dict[str, float], title: str, options: argparse.Namespace) -> None:
    base = rates["forward alone"]
    rows = [
        {"side": name, "images/s": rate, "% of the forward": 100 * rate / base}
        for name, rate in rates.items()
    ]
    ratios = {
        f"{name}, over the forward": rate / base
        for name, rate in rates.items()
        if name != "forward alone"
    }
    tell(title, rows, ratios, options.json, settings=vars(options))


if __name__ == "__main__":
    main()
