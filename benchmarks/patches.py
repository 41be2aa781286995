"""Images/s from uint8 images in memory to normalized patches, beside the published way."""

import argparse
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import report
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from relloc.geometry import CELLS, PatchGrid
from relloc.patches.aperture import Aperture
from relloc.patches.chroma_blur import ChromaBlur
from relloc.patches.color import Drop, Gray, Keep, Project
from relloc.patches.normalize import IMAGENET_MEAN, IMAGENET_STD, ByDataset, PerPatch
from relloc.patches.pipeline import PatchPipeline

GRID = PatchGrid(patch_px=64, gap_px=21, jitter_px=(0, 21), resize=None)  # conf/grid/mmselfsup.yaml
GRAY_P = 0.66
COLORS = {
    "none": Keep(),
    "gray": Gray(p=GRAY_P, weights="luma"),
    "drop": Drop(noise="gaussian"),
    "projection": Project(),
}
NORMALIZATIONS = {"dataset": ByDataset(), "patch": PerPatch()}
# What may be done to patches beside, with the constants of Mundhenk et al. (protocols.md 1.5)
MORE: dict[str, dict[str, Any]] = {
    "": {},
    "scale": {"grid": dataclasses.replace(GRID, scale=(96 / 110, 128 / 110), yoked_scale=True)},
    "chroma blur": {"chroma_blur": ChromaBlur(side_px=13)},
    "aperture": {"aperture": Aperture(low=2 / 3, high=1, whole=3)},
}
# Normalization by patch, and what is done beside, is asked of one treatment alone: none of them
# depends on another.
WAYS = [
    *itertools.product(COLORS, ["dataset"], [""]),
    ("gray", "patch", ""),
    *(("gray", "dataset", more) for more in MORE if more),
]
GHOST = 64  # images whose chance is drawn together, as in training
PUBLISHED = "published, image by image"


def main() -> None:
    """Time every way on every device that is there."""
    asked = _asked()
    torch.set_num_threads(asked.threads)
    rows = [row for device in _devices(asked) for row in _rows(device, asked)]
    best = {
        f"{row['side']} on {row['device']}, gray and dataset, to published": row["to published"]
        for row in rows
        if (row["color"], row["normalize"], row["more"]) == ("gray", "dataset", "")
        and row["side"] != PUBLISHED
    }
    report.tell("images to normalized patches", rows, best, asked.json, settings=vars(asked))


def published(images: list[Image.Image]) -> Tensor:
    """The published way, image by image: mmselfsup 0.x (protocols.md 1.1).

    Gray by chance, a random crop of each cell, and each patch alone to a tensor. Nine patches an
    image; there the center is even repeated for each of its eight pairs.
    """
    to_gray, jitter = transforms.RandomGrayscale(GRAY_P), transforms.RandomCrop(GRID.patch_px)
    to_tensor = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    )

    def patches(image: Image.Image) -> Tensor:
        image = to_gray(image)
        cells = [image.crop(_cell(number)) for number in range(CELLS)]
        return torch.stack([to_tensor(jitter(cell)) for cell in cells])

    return torch.stack([patches(image) for image in images])


def ours(pipeline: PatchPipeline, images: Tensor, make: Callable[..., Tensor]) -> Tensor:
    """As in training: chance ghost batch by ghost batch, then all patches at once."""
    generator = torch.Generator(images.device).manual_seed(0)
    drawn = [pipeline.draw(GHOST, generator) for _ in range(len(images) // GHOST)]
    return make(images, *(torch.cat(parts) for parts in zip(*drawn, strict=True)))


def _cell(number: int) -> tuple[int, int, int, int]:
    top, left = GRID.lowest_corner(number)
    return left, top, left + GRID.pitch_px, top + GRID.pitch_px


def _rows(device: torch.device, asked: argparse.Namespace) -> list[dict]:
    n_images = asked.gpu_images if device.type == "cuda" else asked.images
    of_grid = _images(GHOST, GRID)
    on_host = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in of_grid]
    rows = []
    for color, normalize, more in WAYS:
        plain_pipeline = PatchPipeline(
            grid=GRID, color=COLORS[color], normalize=NORMALIZATIONS[normalize]
        )
        pipeline = dataclasses.replace(plain_pipeline, **MORE[more])
        images = _images(n_images, pipeline.grid).to(device)
        sides = _sides(pipeline, images, compiled=device.type == "cuda" or asked.compile)
        beside = {PUBLISHED: lambda: published(on_host).to(device)}
        seconds = report.median_s(beside | sides, device=device, rounds=asked.rounds)
        plain = GHOST / seconds.pop(PUBLISHED)
        if not rows:
            rows.append(_row(PUBLISHED, device, ("gray", "dataset", ""), plain, 1.0))
        rates = {side: n_images / taken for side, taken in seconds.items()}
        rows += [
            _row(side, device, (color, normalize, more), rate, rate / plain)
            for side, rate in rates.items()
        ]
    return rows


def _sides(
    pipeline: PatchPipeline, images: Tensor, *, compiled: bool
) -> dict[str, Callable[[], object]]:
    sides: dict[str, Callable[[], object]] = {"ours": lambda: ours(pipeline, images, pipeline.make)}
    if compiled:
        # Without it the fifth pipeline would count as a recompilation of the first
        torch.compiler.reset()
        make = torch.compile(pipeline.make, dynamic=False)
        sides["ours, compiled"] = lambda: ours(pipeline, images, make)
    return sides


def _row(
    side: str, device: torch.device, way: tuple[str, str, str], rate: float, ratio: float
) -> dict:
    color, normalize, more = way
    return {
        "side": side,
        "device": device.type,
        "color": color,
        "normalize": normalize,
        "more": more,
        "images/s": rate,
        "to published": ratio,
    }


def _images(n_images: int, grid: PatchGrid) -> Tensor:
    """Noise, channels last in memory as the loader gives images; no step depends on the content."""
    side = grid.span_px
    pixels = torch.randint(256, (n_images, side, side, 3), dtype=torch.uint8)
    return pixels.permute(0, 3, 1, 2)


def _devices(asked: argparse.Namespace) -> list[torch.device]:
    there = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return [torch.device(name) for name in there if asked.device in ("all", name)]


def _asked() -> argparse.Namespace:
    parser = report.arguments(__doc__)
    parser.add_argument(
        "--device", choices=["all", "cpu", "cuda"], default="all", help="where our side runs"
    )
    parser.add_argument(
        "--images", type=int, default=64, help=f"at once on a CPU, a multiple of {GHOST}"
    )
    parser.add_argument(
        "--gpu-images", type=int, default=512, help=f"at once on a GPU, a multiple of {GHOST}"
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="of the CPU; the published way uses one"
    )
    parser.add_argument("--rounds", type=int, default=10, help="timed calls of each side")
    parser.add_argument("--compile", action="store_true", help="compile on a CPU too")
    asked = parser.parse_args()
    for name in ("images", "gpu_images"):
        if getattr(asked, name) < GHOST or getattr(asked, name) % GHOST:
            parser.error(f"--{name.replace('_', '-')} must be a multiple of {GHOST}")
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    return asked


if __name__ == "__main__":
    main()
