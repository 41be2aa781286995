"""Cuts patches out of images of any size and encodes them: the material of studies of patches.

`encode_patches` yields batches of features, each with its image and its box, and holds one batch at
a time: for statistics. `collect_patches` keeps all of them in one matrix for each layer, made for
searches by normalized correlation (`relloc.features.nearest`).

A patch of an image is what its box holds, in pixels of the image as it is stored. It is resized to
`patch_px` x `patch_px` on the device, normalized by ImageNet's colors as in all evaluations, and
encoded by itself. The vector of a patch at a layer, of `PATCH_LAYERS`, is

* "embedding": what the pretext head got of the patch in pretraining: fc6 of the AlexNet-like
  network, the average of the last feature map of the others;
* "feature1" to "feature5": the average of that stage's feature map over its rows and columns.

Batch norm that is recalibrated should see patches as well: `RandomPatch` is a view for that.

Example:
    >>> boxes = RandomSquares(n=20, sides_px=(96,))  # worker processes call it for each image
    >>> keys = patch_keys(range(len(images)), context.seed)
    >>> patches = collect_patches(
    ...     context.backbone, images, keys, boxes, layers=("embedding",), patch_px=96, batch=256,
    ...     config=context.encode_config, what="patches",
    ... )
    >>> vectors = patches.vectors["embedding"]  # (n d): products of rows are correlations
    >>> image, box = patches.images[7], patches.boxes[7]  # where patch 7 lies
"""

import dataclasses
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, Int64, UInt8
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from relloc import checks
from relloc.data.image_set import ImageSet
from relloc.data.loader import Unreadable
from relloc.data.samples import read_samples
from relloc.errors import DataError, UsageError
from relloc.features.source import EncodeConfig, SeededIndex, bank_device, format_gib, free_gib
from relloc.models.backbone import STAGES, Backbone
from relloc.patches.normalize import ByDataset
from relloc.seeds import Use, seed_for
from relloc.terminal import quantity
from relloc.transfer.to_device import to_device

EMBEDDING = "embedding"
PATCH_LAYERS: tuple[str, ...] = (*STAGES, EMBEDDING)
# Of boxes: x1 y1 x2 y2 in whole pixels of the stored image; x2 and y2 are the first ones outside.
Boxes = Int64[np.ndarray, "n 4"]
PatchFeatures = dict[str, Float[Tensor, "b _d"]]  # by layer

_IMAGES_AT_ONCE = 16  # that a worker process reads and hands over together
# Memory, in bytes, for the pixels of boxes that are resized at once.
_WORK_BYTES = 2**29
# For each pixel of a box: its index (8), its values as bytes (3) and as float32 (12), and as much
# again for what is between the two products.
_BYTES_PER_PIXEL = 48
_MIN_NORM = 1e-12  # shorter vectors do not get unit length, as in torch.nn.functional.normalize
_GIB = 2**30


@runtime_checkable
class MakeBoxes(Protocol):
    """Chooses the boxes of the patches of an image, in a worker process: it has to be picklable.

    Frozen dataclasses are. `most` is the largest number of boxes that it returns for any image.
    """

    @property
    def most(self) -> int: ...

    def __call__(self, height: int, width: int, seed: int) -> Boxes:
        """Returns boxes within an image of `height` x `width` px, or none where none fits.

        `seed` is the number that the caller has given beside the image's index: usually a seed, but
        it may also say which of several lists of boxes is meant.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomSquares:
    """Returns `n` random squares of an image, which may overlap.

    The side of each is one of `sides_px` that fit into the image, each equally likely, and its
    place is uniform over whole pixels. An image into which none fits has no boxes.
    """

    n: int
    sides_px: Sequence[int]

    @property
    def most(self) -> int:
        return self.n

    def __call__(self, height: int, width: int, seed: int) -> Boxes:
        fitting = [side for side in self.sides_px if side <= min(height, width)]
        if not fitting:
            return np.zeros((0, 4), dtype=np.int64)
        rng = random.Random(seed)
        boxes = []
        for _ in range(self.n):
            # The order of the draws is fixed: another one would give other boxes.
            side = rng.choice(fitting)
            left = rng.randint(0, width - side)
            top = rng.randint(0, height - side)
            boxes.append((left, top, left + side, top + side))
        return np.array(boxes, dtype=np.int64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomPatch:
    """A view (`relloc.data.views.View`) of one random square, resized to `patch_px` a side.

    Its side is one of `sides_px` that fit into the image; of an image into which none fits it is
    the largest square. Batch norm is recalibrated on such views, in place of whole images.

    Raises:
        UsageError: a number of pixels is wrong.
    """

    sides_px: Sequence[int]
    patch_px: int

    def __post_init__(self) -> None:
        # Studies give their own sides and pixels, so that these are the settings to change; the
        # builder puts the study's name in place of this one.
        checks.wholes("study.patches.sides_px", self.sides_px)
        checks.whole("study.patches.patch_px", self.patch_px)

    def __str__(self) -> str:
        sides = " or ".join(map(str, self.sides_px))
        return f"patches of {sides} px of the stored image, seen at {self.patch_px} px"

    def __call__(self, image: Image.Image, rng: random.Random) -> UInt8[np.ndarray, "s s 3"]:
        short_side = min(image.size)
        fitting = [side for side in self.sides_px if side <= short_side]
        side = rng.choice(fitting or [short_side])
        left = rng.randint(0, image.width - side)
        top = rng.randint(0, image.height - side)
        patch = image.crop((left, top, left + side, top + side))
        resized = patch.resize((self.patch_px, self.patch_px), Image.Resampling.BILINEAR)
        return np.asarray(resized)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class EncodedPatches:
    """A batch of patches: their features on the device in float32, and where they lie.

    `images` are indices of images. `places` are positions in the `keys` that were asked for, which
    differ from one another where an image is asked for several times.
    """

    features: PatchFeatures
    images: Int64[np.ndarray, "b"]
    places: Int64[np.ndarray, "b"]
    boxes: Boxes


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PatchSet:
    """All patches of some images, in the order of images and boxes: one matrix for each layer.

    A row of `vectors` is the feature vector of a patch minus the mean of its own components, scaled
    to length one. So the product of two rows is the normalized correlation of two patches
    (Pearson's, over components), from -1 to 1. A vector of equal components, as of a dead layer,
    is stored as zeros and correlates with nothing.

    `images` and `boxes` are on the CPU; `vectors` are where they fitted, on the device or the CPU.
    """

    vectors: dict[str, Float[Tensor, "n _d"]]
    images: Int64[Tensor, "n"]
    boxes: Int64[Tensor, "n 4"]

    def __len__(self) -> int:
        return len(self.images)


def patch_keys(indices: Iterable[int], seed: int) -> list[SeededIndex]:
    """Returns the indices of images, each with a seed for its boxes that depends on it alone."""
    return [(index, seed_for(Use.STUDY_PATCHES, seed, index)) for index in indices]


def patch_dims(backbone: Backbone, layers: Sequence[str]) -> dict[str, int]:
    """Returns the number of components of a patch's vector, by layer."""
    dims: dict[str, int] = dict(zip(STAGES, backbone.stage_channels, strict=True))
    dims[EMBEDDING] = backbone.embedding_dim
    return {layer: dims[layer] for layer in layers}


def collect_patches(
    backbone: Backbone,
    images: ImageSet,
    keys: Sequence[SeededIndex],
    make_boxes: MakeBoxes,
    *,
    layers: Sequence[str],
    patch_px: int,
    batch: int,
    config: EncodeConfig,
    what: str,
    dtype: torch.dtype = torch.float16,
) -> PatchSet:
    """Encodes patches as `encode_patches` does, and keeps their unit vectors in memory.

    Memory is allocated once, for `make_boxes.most` patches of each image: on the device if less
    than half of what is free there suffices, otherwise on the CPU. In float16 a million patches of
    4,096 components take 7.6 GiB; correlations are then off by about 1e-5,
    of vectors of few components by up to 5e-4.

    Raises:
        UsageError: the memory is too small for all patches.
        DataError: there is no patch at all, or too many images can't be read.
    """
    dims = patch_dims(backbone, layers)
    most = len(keys) * make_boxes.most
    values_per_patch = sum(dims.values())
    needed_gib = most * values_per_patch * dtype.itemsize / _GIB
    device = bank_device(needed_gib, config.device)
    available_gib = free_gib(device)
    if needed_gib > available_gib:
        raise UsageError(
            f"{most:,} patches at {', '.join(layers)} take {format_gib(needed_gib)}, but the "
            f"memory of {device} has only {format_gib(available_gib)} free: give fewer images, "
            "fewer patches of each or fewer layers, or free memory"
        )
    vectors = {}
    for layer, dim in dims.items():
        vectors[layer] = torch.empty(most, dim, dtype=dtype, device=device)
    image_parts = []
    box_parts = []
    n_filled = 0
    encoded = encode_patches(
        backbone,
        images,
        keys,
        make_boxes,
        layers=layers,
        patch_px=patch_px,
        batch=batch,
        config=config,
        what=what,
    )
    for part in encoded:
        end = n_filled + len(part.images)
        for layer, rows in vectors.items():
            # Rounded on the device, so that less is copied where they are kept on the CPU.
            rows[n_filled:end] = unit_vectors(part.features[layer]).to(dtype)
        image_parts.append(part.images)
        box_parts.append(part.boxes)
        n_filled = end
    if not n_filled:
        raise DataError(
            f"none of {quantity(len(keys), 'image')} of {images.name} {images.split} has a patch: "
            "none could be read, or all are smaller than the patches. Give smaller patches, or "
            "other images"
        )
    # Small or unreadable images leave rows at the end unused.
    return PatchSet(
        vectors={layer: rows[:n_filled] for layer, rows in vectors.items()},
        images=torch.from_numpy(np.concatenate(image_parts)),
        boxes=torch.from_numpy(np.concatenate(box_parts)),
    )


def unit_vectors(features: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Returns vectors less the mean of their own components, at length one.

    The product of two of them is the normalized correlation of the two feature vectors. Vectors of
    equal components become zeros.
    """
    centered = features - features.mean(dim=1, keepdim=True)
    norms = torch.linalg.vector_norm(centered, dim=1, keepdim=True)
    # What is left of equal components is the rounding of their mean, and no direction.
    sizes = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    rounding = 4 * torch.finfo(features.dtype).eps * sizes
    is_flat = norms <= rounding
    return torch.where(is_flat, 0, centered / norms.clamp(min=_MIN_NORM))


def encode_patches(
    backbone: Backbone,
    images: ImageSet,
    keys: Sequence[SeededIndex],
    make_boxes: MakeBoxes,
    *,
    layers: Sequence[str],
    patch_px: int,
    batch: int,
    config: EncodeConfig,
    what: str,
) -> Iterator[EncodedPatches]:
    """Yields the features of the patches of images, `batch` patches at a time.

    Patches come in the order of `keys`, and for each image in the order of its boxes, whatever
    `batch` and the number of worker processes are. Images that can't be read are left out and
    counted, once for all.

    Args:
        backbone: the network, in eval mode and on `config.device`.
        images: the images, which worker processes read at the size at which they are stored.
        keys: the index of each image, and the seed that `make_boxes` gets for it.
        make_boxes: chooses boxes. A box that is not square is stretched to a square.
        layers: some of `PATCH_LAYERS`. Where "embedding" is named beside a stage, patches pass the
            network twice.
        patch_px: side of the patches that the network sees.
        batch: number of patches that are encoded at once.
        config: device, precision, worker processes and progress bar.
        what: the text beside the progress bar.

    Raises:
        DataError: more images can't be read than `config.unreadable_share` allows.
        ValueError: a box lies not within its image, or there are more boxes than `most`.
    """
    batches = []
    for start in range(0, len(keys), _IMAGES_AT_ONCE):
        batches.append(list(keys[start : start + _IMAGES_AT_ONCE]))
    read = read_samples(
        images,
        _ReadWithBoxes(images=images, make_boxes=make_boxes),
        batches,
        workers=config.workers,
        stopping=config.stopping,
    )
    unreadable = config.unreadable_of(len(images))
    shown = config.progress(read, what, len(batches))
    chosen = _chosen_patches(shown, unreadable)
    for patches, part in _full_batches(chosen, patch_px, batch, config.device):
        features = patch_features(backbone, patches, tuple(layers), config.bf16)
        yield EncodedPatches(
            features=features,
            images=part.images,
            places=part.places,
            boxes=part.boxes,
        )


@torch.no_grad()
def patch_features(
    backbone: Backbone,
    patches: Float[Tensor, "b 3 p p"],
    layers: tuple[str, ...],
    bf16: bool,
) -> PatchFeatures:
    """Returns the vectors of patches with values from 0 to 255, by layer, in float32."""
    features = {}
    with torch.autocast(patches.device.type, torch.bfloat16, enabled=bf16):
        normalized = ByDataset()(patches)
        if EMBEDDING in layers:
            features[EMBEDDING] = backbone.embed(normalized).float()
        stages = [layer for layer in layers if layer != EMBEDDING]
        maps = backbone(normalized) if stages else {}
        for stage in stages:
            # Half precision overflows in sums over maps.
            features[stage] = maps[stage].float().mean(dim=(2, 3))
    return {layer: features[layer] for layer in layers}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _ImageWithBoxes:
    """The pixels of an image, which are left out where it has no boxes, and its boxes."""

    index: int
    pixels: UInt8[np.ndarray, "h w 3"]
    boxes: Boxes


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ReadWithBoxes:
    """Reads an image in a worker process, and chooses its boxes by a seed."""

    images: ImageSet
    make_boxes: MakeBoxes

    def __call__(self, index: int, seed: int) -> _ImageWithBoxes:
        image = self.images.read(index)
        boxes = self.make_boxes(image.height, image.width, seed)
        self._check(boxes, image.height, image.width, index)
        if not len(boxes):
            # Pixels that nobody needs are not sent.
            pixels = np.zeros((0, 0, 3), dtype=np.uint8)
            return _ImageWithBoxes(index=index, pixels=pixels, boxes=boxes)
        return _ImageWithBoxes(index=index, pixels=np.array(image), boxes=boxes)

    def _check(self, boxes: Boxes, height: int, width: int, index: int) -> None:
        """Raises `ValueError` for boxes that can't be cut."""
        x1, y1, x2, y2 = boxes.T
        is_ordered = (x1 >= 0) & (y1 >= 0) & (x1 < x2) & (y1 < y2)
        is_within = is_ordered & (x2 <= width) & (y2 <= height)
        if not is_within.all():
            box = boxes[~is_within][0].tolist()
            name = self.images.source(index)
            raise ValueError(f"{name} has {width} x {height} px: no box {box} can be cut from it")
        if len(boxes) > self.make_boxes.most:
            raise ValueError(f"{len(boxes)} boxes were chosen, {self.make_boxes.most} at most said")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Chosen:
    """Patches that were chosen in some images, before they are cut.

    `numbers` say which of `pixels` a box belongs to.
    """

    pixels: Sequence[UInt8[np.ndarray, "_ _ 3"]]
    numbers: Int64[np.ndarray, "b"]
    images: Int64[np.ndarray, "b"]
    places: Int64[np.ndarray, "b"]
    boxes: Boxes

    def part(self, start: int, end: int) -> "_Chosen":
        """Returns the patches from `start` to before `end`, with all images."""
        return _Chosen(
            pixels=self.pixels,
            numbers=self.numbers[start:end],
            images=self.images[start:end],
            places=self.places[start:end],
            boxes=self.boxes[start:end],
        )


def _chosen_patches(read: Iterable, unreadable: Unreadable) -> Iterator[_Chosen]:
    """Yields the patches of each batch of images that was read, and counts unreadable images."""
    first_place = 0
    for sample_batch in read:
        unreadable.add(sample_batch.unreadable)
        samples: Sequence[_ImageWithBoxes] = sample_batch.samples
        counts = [len(sample.boxes) for sample in samples]
        indices = [sample.index for sample in samples]
        places = [first_place + place for place in sample_batch.places]
        boxes = [np.zeros((0, 4), dtype=np.int64), *(sample.boxes for sample in samples)]
        yield _Chosen(
            pixels=[sample.pixels for sample in samples],
            numbers=np.repeat(np.arange(len(samples)), counts),
            images=np.repeat(np.array(indices, dtype=np.int64), counts),
            places=np.repeat(np.array(places, dtype=np.int64), counts),
            boxes=np.concatenate(boxes),
        )
        first_place += _IMAGES_AT_ONCE


def _full_batches(
    chosen: Iterable[_Chosen], patch_px: int, batch: int, device: torch.device
) -> Iterator[tuple[Float[Tensor, "b 3 p p"], _Chosen]]:
    """Yields patches (0..255) in batches of one size, whichever images they come from.

    No more than two batches of patches are in memory; only the last one may be smaller.
    """
    waiting: list[tuple[Tensor, _Chosen]] = []
    n_waiting = 0
    for patches_of_images in chosen:
        n_patches = len(patches_of_images.boxes)
        # Images are not copied to the device if they have no patches.
        flat = flat_images(patches_of_images.pixels, device) if n_patches else None
        start = 0
        while flat is not None and start < n_patches:
            # As many as fill the batch that was begun with patches of earlier images.
            end = min(n_patches, start + batch - n_waiting)
            part = patches_of_images.part(start, end)
            patches = cut_resized(flat, part.numbers, part.boxes, patch_px)
            waiting.append((patches, part))
            n_waiting += end - start
            start = end
            if n_waiting == batch:
                yield _joined(waiting)
                waiting = []
                n_waiting = 0
    if waiting:
        yield _joined(waiting)


def _joined(waiting: Sequence[tuple[Tensor, _Chosen]]) -> tuple[Tensor, _Chosen]:
    """Returns patches of several parts as one, without the pixels of their images."""
    parts = [part for _, part in waiting]
    joined = _Chosen(
        pixels=[],
        numbers=np.concatenate([part.numbers for part in parts]),
        images=np.concatenate([part.images for part in parts]),
        places=np.concatenate([part.places for part in parts]),
        boxes=np.concatenate([part.boxes for part in parts]),
    )
    return torch.cat([patches for patches, _ in waiting]), joined


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FlatImages:
    """Images of any sizes on the device: their pixels one after the other, row by row.

    `starts` are the numbers of the first pixels of the images, `widths` their widths in pixels.
    """

    pixels: UInt8[Tensor, "pixels 3"]
    starts: Int64[np.ndarray, "images"]
    widths: Int64[np.ndarray, "images"]


def flat_images(arrays: Sequence[UInt8[np.ndarray, "_ _ 3"]], device: torch.device) -> FlatImages:
    """Copies images to the device, to a GPU by one copy for which the process does not wait."""
    sizes = [array.shape[0] * array.shape[1] for array in arrays]
    ends = np.cumsum(sizes, dtype=np.int64)
    starts = ends - np.array(sizes, dtype=np.int64)
    on_gpu = device.type == "cuda"
    staged = torch.empty(int(ends[-1]), 3, dtype=torch.uint8, pin_memory=on_gpu)
    # numpy copies: torch would share the work among threads, which are busy decoding images.
    rows = staged.numpy()
    for array, start, end in zip(arrays, starts, ends, strict=True):
        rows[start:end] = array.reshape(-1, 3)
    return FlatImages(
        pixels=staged.to(device, non_blocking=True),
        starts=starts,
        widths=np.array([array.shape[1] for array in arrays], dtype=np.int64),
    )


def cut_resized(
    images: FlatImages,
    numbers: Int[np.ndarray, "b"],
    boxes: Boxes,
    patch_px: int,
) -> Float[Tensor, "b 3 p p"]:
    """Returns what boxes hold, each resized to `patch_px` x `patch_px`, with values 0..255.

    Resizing is linear and antialiased: each new pixel is the mean of the pixels under a triangle
    twice as wide as itself, as in Pillow and in torch's `interpolate(antialias=True)`. It sees the
    pixels of the box alone, and does not round to whole gray levels. Boxes that have `patch_px`
    already stay as they are. Where the run's precision is tf32 or bf16, the weights are rounded to
    11 bits (0.1 gray levels).

    Args:
        images: the images.
        numbers: which image each box belongs to.
        boxes: within their images.
        patch_px: side of the patches.
    """
    if images.pixels.device.type == "cpu":
        return _cut_one_by_one(images, numbers, boxes, patch_px)
    return _cut_together(images, numbers, boxes, patch_px)


def _cut_one_by_one(
    images: FlatImages,
    numbers: Int[np.ndarray, "b"],
    boxes: Boxes,
    patch_px: int,
) -> Float[Tensor, "b 3 p p"]:
    """Does what `cut_resized` does, box by box: a CPU is faster with slices than with indices."""
    patches = torch.empty(len(boxes), 3, patch_px, patch_px)
    size = (patch_px, patch_px)
    for patch, number, (x1, y1, x2, y2) in zip(patches, numbers, boxes.tolist(), strict=True):
        start = int(images.starts[number])
        width = int(images.widths[number])
        # The rows of the box, as a view of the pixels (rows width 3)
        rows = images.pixels[start + y1 * width : start + y2 * width].view(-1, width, 3)
        box = rows[:, x1:x2].permute(2, 0, 1)
        if box.shape[1:] == size:
            patch.copy_(box)
        else:
            patch.copy_(interpolate(box[None].float(), size, mode="bilinear", antialias=True)[0])
    return patches


def _cut_together(
    images: FlatImages,
    numbers: Int[np.ndarray, "b"],
    boxes: Boxes,
    patch_px: int,
) -> Float[Tensor, "b 3 p p"]:
    """Does what `cut_resized` does, for many boxes at once: a GPU waits for one at a time."""
    device = images.pixels.device
    widths = boxes[:, 2] - boxes[:, 0]
    heights = boxes[:, 3] - boxes[:, 1]
    patches = torch.empty(len(boxes), 3, patch_px, patch_px, device=device)
    # Boxes of one part are padded to one size, so that parts should have boxes of similar sizes.
    order = np.argsort(heights * widths, kind="stable")
    for part in _parts_in_memory(order, heights, widths, _WORK_BYTES):
        columns = (
            images.starts[numbers[part]],
            images.widths[numbers[part]],
            boxes[part, 0],
            boxes[part, 1],
            widths[part],
            heights[part],
            part,
        )
        # One copy to the device for all numbers
        table = to_device(torch.from_numpy(np.stack(columns)), device)
        starts, strides, lefts, tops, box_widths, box_heights, targets = table.unsqueeze(2)
        # Pixels beyond a smaller box repeat its last one; they get no weight below.
        x = torch.arange(int(widths[part].max()), device=device)
        y = torch.arange(int(heights[part].max()), device=device)
        columns_of_box = lefts + torch.minimum(x, box_widths - 1)
        rows_of_box = tops + torch.minimum(y, box_heights - 1)
        row_starts = starts + rows_of_box * strides
        indices = row_starts.unsqueeze(2) + columns_of_box.unsqueeze(1)
        pixels = images.pixels[indices].float()
        if (widths[part] == patch_px).all() and (heights[part] == patch_px).all():
            resized = pixels.permute(0, 3, 1, 2)
        else:
            resized = _resized(pixels, box_heights, box_widths, patch_px)
        patches[targets.squeeze(1)] = resized
    return patches


def _parts_in_memory(
    order: Int64[np.ndarray, "b"],
    heights: Int64[np.ndarray, "b"],
    widths: Int64[np.ndarray, "b"],
    most_bytes: int,
) -> Iterator[Int64[np.ndarray, "part"]]:
    """Yields parts of `order` whose padded boxes fit into `most_bytes`, one box at least."""
    first = 0
    tallest = widest = 0
    for place, box in enumerate(order):
        tallest = max(tallest, int(heights[box]))
        widest = max(widest, int(widths[box]))
        n_boxes = place + 1 - first
        if n_boxes > 1 and n_boxes * tallest * widest * _BYTES_PER_PIXEL > most_bytes:
            yield order[first:place]
            first = place
            tallest = int(heights[box])
            widest = int(widths[box])
    if first < len(order):
        yield order[first:]


def _resized(
    pixels: Float[Tensor, "b h w 3"],
    heights: Int64[Tensor, "b 1"],
    widths: Int64[Tensor, "b 1"],
    patch_px: int,
) -> Float[Tensor, "b 3 p p"]:
    """Resizes boxes in the upper left of `pixels`, by one product for rows and one for columns."""
    row_weights = _weights(heights, patch_px, pixels.shape[1])
    column_weights = _weights(widths, patch_px, pixels.shape[2])
    rows = row_weights @ pixels.flatten(2)
    # (b p w 3) to (b 3 p w)
    rows = rows.unflatten(2, pixels.shape[2:]).permute(0, 3, 1, 2)
    return rows @ column_weights.transpose(1, 2).unsqueeze(1)


def _weights(sides: Int64[Tensor, "b 1"], patch_px: int, n: int) -> Float[Tensor, "b p n"]:
    """Returns the weights of `n` old pixels in each new one, when a side becomes `patch_px`.

    Old pixels from the side on have no weight.
    """
    scale = (sides / patch_px).unsqueeze(2)
    new_centers = torch.arange(patch_px, device=sides.device).view(1, -1, 1) + 0.5
    old_centers = torch.arange(n, device=sides.device).view(1, 1, -1) + 0.5
    distances = (old_centers - new_centers * scale).abs()
    # Enlarging is plain linear interpolation, between two old pixels.
    weights = (1 - distances / scale.clamp(min=1)).clamp(min=0)
    weights = weights * (old_centers < sides.unsqueeze(2))
    return weights / weights.sum(dim=2, keepdim=True)


def check_patch_settings(setting: str, *, layers: object, patch_px: object, batch: object) -> None:
    """Checks what all studies of patches have as settings, below `setting`.

    Raises:
        UsageError: one of them is wrong; the message names it and its value.
    """
    checks.some_of(f"{setting}.layers", layers, PATCH_LAYERS)
    checks.whole(f"{setting}.patch_px", patch_px)
    checks.whole(f"{setting}.batch", batch)
