"""What decode=device changes, and how fast it is: the same images by both ways in one run.

Prints the difference of pixels, of crops of the pretraining and of views of evaluations; with
--run the pretext loss and accuracy on both, and how far features turn (one minus cosine); then the
rates at which views reach the device, by the number of workers. On a CPU both ways decode by
libjpeg, and pixels are equal. input.py has the rates of pretraining.
"""

import argparse
import os
import statistics
import time
from typing import Any

import torch
from input import cpu_s
from reencoding import asked, network_of, turned_by
from report import arguments, tell
from torch import Tensor

from relloc.data.crops import Crops
from relloc.data.device_decoding import load_to_device
from relloc.data.folder import folder
from relloc.data.image_set import ImageSet
from relloc.data.loader import load
from relloc.data.shards import shards
from relloc.data.undecoded import UndecodedSamples
from relloc.data.views import Center, RandomResized, View, Views
from relloc.errors import UsageError
from relloc.features.source import EncodeConfig
from relloc.geometry import PatchGrid, ShortSide
from relloc.runs.run_settings import DECODES
from relloc.seeds import Use, seed_for

GRID = PatchGrid(
    patch_px=64, gap_px=21, jitter_px=(0, 21), resize=ShortSide(px=292)
)  # conf/grid/mmselfsup.yaml
VIEWS: dict[str, View] = {
    "random resized views": RandomResized(crop_px=224),
    "center views": Center(short_px=256, crop_px=224),
}
COMPARED_AT_ONCE = 64
Row = dict[str, Any]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--root", help="a folder of image files")
    parser.add_argument("--shards", help="or what relloc.prepare made of one")
    parser.add_argument("--run", help="the run folder of a finished pretraining")
    parser.add_argument("--images", type=int, default=512, help="that are compared")
    parser.add_argument("--timed", type=int, default=4096, help="images a worker, when timed")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, nargs="+", default=[max(1, cores - 1)])
    options = parser.parse_args()
    if bool(options.root) == bool(options.shards):
        raise UsageError("give either --root or --shards")
    if options.root:
        images: ImageSet = folder(name="images", root=options.root, held_out_share=0.05).train
    else:
        images = shards(root=options.shards).train
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    rows = _differences(images, device, options)
    rates = _rates(images, device, options)
    ratios = {}
    for (name, workers, decode), row in rates.items():
        if decode == "device":
            ratio = row["images/s"] / rates[name, workers, "cpu"]["images/s"]
            ratios[f"decode=device to cpu, {name}, {workers} workers"] = ratio
    tell("decoding", [*rows, *rates.values()], ratios, options.json, settings=vars(options))


def _differences(images: ImageSet, device: torch.device, options: argparse.Namespace) -> list[Row]:
    """Returns how pixels differ and, of a run, what its network says of both."""
    n_images = min(options.images, len(images))
    network = network_of(options.run) if options.run else None
    grid = network[1].grid if network else GRID
    samples: dict[str, UndecodedSamples] = {
        "crops": Crops(images, grid, use=Use.CROP, seed=0, centered=False),
        **{name: Views(images, view) for name, view in VIEWS.items()},
    }
    rows: list[Row] = []
    pixels: dict[str, tuple[Tensor, Tensor]] = {}
    for name, of_kind in samples.items():
        pixels[name] = _both_ways(of_kind, n_images, device)
        on_cpu, on_device = pixels[name]
        difference = (on_cpu.int() - on_device.int()).abs()
        rows.append(
            {
                "what": f"{name}, difference",
                "images": len(on_cpu),
                "gray levels": difference.float().mean().item(),
                "above 1, %": 100 * (difference > 1).float().mean().item(),
                "largest": difference.max().item(),
            }
        )
    if network:
        model, patches = network
        for decode, crops in zip(DECODES, pixels["crops"], strict=True):
            row = asked(model, patches, crops, f"decode={decode}")
            rows.append({"what": row.pop("source"), **row})
        turned = turned_by(model, *pixels["center views"])
        rows += [{"what": f"1 - cosine, {layer}", "value": by} for layer, by in turned.items()]
    return rows


def _both_ways(samples: Any, n_images: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the pixels of the same samples decoded in this process, and on the device."""
    keys = [(index, seed_for(Use.CROP, 0, index)) for index in range(n_images)]
    batches = [
        keys[start : start + COMPARED_AT_ONCE] for start in range(0, n_images, COMPARED_AT_ONCE)
    ]
    on_cpu = load(samples, batches, workers=0, pin=False)
    on_device = load_to_device(samples, batches, workers=0, device=device)
    return (
        torch.cat([batch.pixels for batch in on_cpu if len(batch.pixels)]),
        torch.cat([batch.pixels.cpu() for batch in on_device if len(batch.pixels)]),
    )


def _rates(
    images: ImageSet, device: torch.device, options: argparse.Namespace
) -> dict[tuple[str, int, str], Row]:
    """Returns the median rates by view, number of workers and decode, measured in turns."""
    found: dict[tuple[str, int, str], list[tuple[float, float]]] = {}
    sides = [(name, decode) for name in VIEWS for decode in DECODES]
    for workers in options.workers:
        for _ in range(options.rounds):
            for name, decode in sides:
                config = EncodeConfig(
                    batch=options.batch,
                    workers=workers,
                    device=device,
                    precision="fp32",
                    unreadable_share=1,
                    decode=decode,
                )
                rates = _rates_of(images, VIEWS[name], config, options.timed)
                found.setdefault((name, workers, decode), []).append(rates)
    rows = {}
    for (name, workers, decode), rates in found.items():
        by_clock, by_cpu = map(statistics.median, zip(*rates, strict=True))
        rows[name, workers, decode] = {
            "what": f"{name} to {device.type}, decode={decode}",
            "workers": workers,
            "images/s": by_clock,
            "a core": by_cpu,
        }
    return rows


def _rates_of(
    images: ImageSet, view: View, config: EncodeConfig, timed: int
) -> tuple[float, float]:
    """Returns the images/s of views by the clock, and by processor seconds.

    By the clock, each worker's first batch, with its start, is not counted.
    """
    started_after = max(1, config.workers)
    n_images = max(1, timed // config.batch) * started_after * config.batch
    n_read = n_images + started_after * config.batch
    keys = ((place % len(images), place) for place in range(n_read))
    cpu_before = cpu_s()
    batches = iter(config.views(images, view, keys, config.batch))
    for _ in range(started_after):
        config.to_device(next(batches).pixels)
    started = time.perf_counter()
    n_given = 0
    for batch in batches:
        n_given += len(config.to_device(batch.pixels))
    if config.device.type == "cuda":
        torch.cuda.synchronize(config.device)
    return n_given / (time.perf_counter() - started), n_read / (cpu_s() - cpu_before)


if __name__ == "__main__":
    main()
