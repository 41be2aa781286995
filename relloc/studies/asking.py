"""Asks the network of the pretext task about grids of patches at chosen places of images.

Which grids an image gives depends on the run's seed and on the image alone, neither on the batch
size nor on the device: so each network, and each person, can be asked the same questions.
"""

import dataclasses
import random
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64, UInt8
from torch import Tensor

from relloc.data.image_set import ImageSet
from relloc.data.images import crop_resized
from relloc.errors import DataError, UnreadableImage, UsageError
from relloc.evaluation.contract import PretextModel
from relloc.features.source import EncodeConfig
from relloc.geometry import CENTER, NEIGHBORS, PatchGrid
from relloc.seeds import Use, seed_for
from relloc.studies.image_reading import IMAGES_AT_ONCE, read_counted

PairBoxes = Float64[np.ndarray, "n 8 4"]  # x1 y1 x2 y2 in pixels of the stored image
Logits = Float[Tensor, "n 8 8"]  # grid, pair, label


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ImageGrids:
    """Squares of an image that hold a grid each, and where they come from.

    Attributes:
        index: the number of the image.
        crops: the pixels; `s` is the grid's `span_px`.
        tops_lefts: the corner of each crop, in pixels of the resized image.
        scales: the size of a pixel of the resized image, in pixels of the stored one, down and
            across.
    """

    index: int
    crops: UInt8[np.ndarray, "n s s 3"]
    tops_lefts: Int64[np.ndarray, "n 2"]
    scales: Float64[np.ndarray, "n 2"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadGrids:
    """Reads an image in a worker process, and cuts squares for grids out of it.

    With `places` None it is one square at the center, as held-out accuracy is measured on.
    Otherwise it is so many at random places, which may overlap, as training sees them.
    """

    images: ImageSet
    grid: PatchGrid
    places: int | None

    def __call__(self, index: int, seed: int) -> ImageGrids:
        """Returns the squares; `seed` decides their sizes and places.

        Raises:
            UnreadableImage: the image can't be read, or is smaller than the grid and not resized.
        """
        image = self.images.read(index)
        rng = random.Random(seed)
        side = self.grid.span_px
        crops = []
        corners = []
        scales = []
        for _ in range(self.places or 1):
            try:
                height, width = self.grid.resized(image.height, image.width, rng.random())
            except ValueError as error:
                raise UnreadableImage(str(error)) from error
            if self.places is None:
                top = (height - side) // 2
                left = (width - side) // 2
            else:
                # The order of the draws is fixed: another one would give other places.
                top = rng.randint(0, height - side)
                left = rng.randint(0, width - side)
            crop = crop_resized(image, (height, width), (top, left), side)
            crops.append(np.asarray(crop))
            corners.append((top, left))
            scales.append((image.height / height, image.width / width))
        return ImageGrids(
            index=index,
            crops=np.stack(crops),
            tops_lefts=np.array(corners, dtype=np.int64),
            scales=np.array(scales, dtype=np.float64),
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """What a network answered about the eight pairs of each grid, on the CPU.

    Attributes:
        logits: of each pair and label; the right label of pair i is i.
        images: the number of the image of each grid.
        pair_boxes: the box around both patches of each pair.
        patch_sides: height and width of a patch, in pixels of the stored image; the largest, where
            patches are cut at several sizes.
    """

    logits: Logits
    images: Int64[np.ndarray, "n"]
    pair_boxes: PairBoxes
    patch_sides: Float64[np.ndarray, "n 2"]


def check_grid(setting: str, grid: object) -> None:
    """Raises `UsageError` unless `grid` is a geometry or None."""
    if grid is not None and not isinstance(grid, PatchGrid):
        raise UsageError(
            f"{setting}.grid is {grid}: choose a member of conf/grid by grid@{setting}.grid=NAME, "
            "such as mmselfsup, or leave it out"
        )
    if grid is not None and grid.rows != 3:
        raise UsageError(
            f"{setting}.grid.rows is {grid.rows}: studies ask about the center of a 3x3 grid, so "
            "leave it out"
        )


def grid_to_ask(setting: str, grid: PatchGrid | None, pretext: PretextModel) -> PatchGrid:
    """Returns the grid of a study's setting, or by default the one that the network learned on.

    Raises:
        UsageError: the patches of the setting have another side than those of the network.
    """
    own = pretext.patches.grid
    if grid is None:
        return own
    if grid.patch_px != own.patch_px:
        raise UsageError(
            f"{setting}.grid.patch_px is {grid.patch_px}, but the network was trained on patches "
            f"of {own.patch_px} px: give {setting}.grid.patch_px={own.patch_px}, or leave out "
            f"the grid of {setting}"
        )
    return grid


def ask(
    pretext: PretextModel,
    images: ImageSet,
    indices: Sequence[int],
    *,
    grid: PatchGrid,
    places: int | None,
    seed: int,
    batch: int,
    config: EncodeConfig,
) -> Answers:
    """Asks a network about all pairs of the grids of some images.

    Jitter and colors are drawn on the CPU, image by image: the questions are the same for any
    `batch`, number of worker processes and device. Images that can't be read are left out.

    Args:
        pretext: the network, on `config.device`, and the color treatment that it was trained with.
        images: the images.
        indices: which of them are asked about.
        grid: the geometry of the patches.
        places: how many grids an image gives, as in `ReadGrids`.
        seed: of all random numbers.
        batch: number of grids that pass the network at once.
        config: device, precision, worker processes and progress bar.

    Raises:
        DataError: more images can't be read than `config.unreadable_share` allows, or none can.
        UsageError: an answer of the network is not finite.
    """
    use = Use.HELD_OUT_CROP if places is None else Use.ASKED_PLACES
    keys = [(index, seed_for(use, seed, index)) for index in indices]
    read = read_counted(
        images,
        ReadGrids(images=images, grid=grid, places=places),
        keys,
        f"questions about {images.name} {images.split}",
        config=config,
        # Of many grids of an image, about as many as of one grid of each image
        at_once=max(1, IMAGES_AT_ONCE // (places or 1)),
    )
    pipeline = dataclasses.replace(pretext.patches, grid=grid)
    asked: list[_Asked] = []
    logits = []

    def drawn_grids() -> Iterator[tuple[Tensor, ...]]:
        for sample_batch in read:
            for sample in sample_batch.samples:
                crops = torch.from_numpy(sample.crops).permute(0, 3, 1, 2)
                patches_seed = seed_for(Use.ASKED_PATCHES, seed, sample.index)
                generator = torch.Generator().manual_seed(patches_seed)
                drawn = pipeline.draw(len(crops), generator)
                asked.append(_asked(sample, drawn[0].numpy(), grid))
                yield crops, *drawn

    for part in _batches(drawn_grids(), batch):
        on_device = [tensor.to(config.device, non_blocking=True) for tensor in part]
        logits.append(network_logits(pretext, pipeline.make(*on_device), config))
    if not asked:
        raise DataError(f"none of the images of {images.name} {images.split} can be read")
    return Answers(
        logits=torch.cat(logits),
        images=np.concatenate([each.images for each in asked]),
        pair_boxes=np.concatenate([each.pair_boxes for each in asked]),
        patch_sides=np.concatenate([each.patch_sides for each in asked]),
    )


@torch.no_grad()
def network_logits(
    pretext: PretextModel, patches: Float[Tensor, "b 9 3 p p"], config: EncodeConfig
) -> Float[Tensor, "b 8 8"]:
    """Returns the logits of patches, in float32 on the CPU.

    Raises:
        UsageError: one of them is not finite.
    """
    with torch.autocast(patches.device.type, torch.bfloat16, enabled=config.bf16):
        logits = pretext.network(patches)
    logits = logits.float().cpu()
    if not logits.isfinite().all():
        raise UsageError(
            "the network of the pretext task answers nan or infinity: it may have diverged, or "
            "half precision overflowed; give precision=fp32 or another checkpoint"
        )
    return logits


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Asked:
    """Where the pairs of an image lie: fields of `Answers`."""

    images: Int64[np.ndarray, "n"]
    pair_boxes: PairBoxes
    patch_sides: Float64[np.ndarray, "n 2"]


def _asked(sample: ImageGrids, corners: Int64[np.ndarray, "n 9 2"], grid: PatchGrid) -> _Asked:
    in_resized = sample.tops_lefts[:, None] + corners
    return _Asked(
        images=np.full(len(corners), sample.index, dtype=np.int64),
        pair_boxes=_pair_boxes(in_resized, grid.cell_px, sample.scales),
        patch_sides=grid.cell_px * sample.scales,
    )


def _pair_boxes(
    corners: Int64[np.ndarray, "n 9 2"],
    cell_px: int,
    scales: Float64[np.ndarray, "n 2"],
) -> PairBoxes:
    """Returns the box around each neighbor and the center.

    `corners` (row, column) are in pixels of the resized image, `scales` as in `ImageGrids`.
    """
    centers = corners[:, CENTER, None]
    neighbors = corners[:, list(NEIGHBORS)]
    tops_lefts = np.minimum(centers, neighbors) * scales[:, None]
    ends = (np.maximum(centers, neighbors) + cell_px) * scales[:, None]
    # (row, column) to (x, y)
    return np.concatenate([tops_lefts[..., ::-1], ends[..., ::-1]], axis=2)


def _batches(parts: Iterable[tuple[Tensor, ...]], size: int) -> Iterator[tuple[Tensor, ...]]:
    """Yields tensors joined along their first dimension, `size` rows at a time."""
    waiting: list[tuple[Tensor, ...]] = []
    n_waiting = 0
    for part in parts:
        waiting.append(part)
        n_waiting += len(part[0])
        if n_waiting < size:
            continue
        joined = [torch.cat(tensors) for tensors in zip(*waiting, strict=True)]
        n_full = n_waiting // size * size
        for start in range(0, n_full, size):
            yield tuple(tensor[start : start + size] for tensor in joined)
        waiting = [tuple(tensor[n_full:] for tensor in joined)]
        n_waiting -= n_full
    if n_waiting:
        yield tuple(torch.cat(tensors) for tensors in zip(*waiting, strict=True))
