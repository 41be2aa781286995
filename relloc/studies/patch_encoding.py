"""Cuts patches out of images and encodes them, each by itself.

`encode_patches` yields batches of features, each with its image and its box, and holds one batch at
a time: for statistics. `relloc.studies.patch_vectors` keeps all of them.

What the box of a patch holds is resized to `patch_px` x `patch_px` on the device, normalized by
ImageNet's colors as in all evaluations, and encoded. The vector of a patch at a layer, of
`PATCH_LAYERS`, is

* "embedding": what the pretext head got of the patch in pretraining: fc6 of the AlexNet-like
  network, the average of the last feature map of the others;
* "feature1" to "feature5": the average of that stage's feature map over its rows and columns.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from relloc import checks
from relloc.data.image_set import ImageSet
from relloc.data.samples import SampleBatch
from relloc.features.source import EncodeConfig, SeededIndex
from relloc.models.backbone import STAGES, Backbone
from relloc.patches.normalize import ByDataset
from relloc.studies.image_reading import read_counted
from relloc.studies.patch_cutting import cut_resized, flat_images
from relloc.studies.patch_sets import Boxes, MakeBoxes

EMBEDDING = "embedding"
PATCH_LAYERS: tuple[str, ...] = (*STAGES, EMBEDDING)
PatchFeatures = dict[str, Float[Tensor, "b _d"]]  # by layer


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class EncodedPatches:
    """A batch of patches: their features on the device in float32, and where they lie.

    `images` are the indices of their images.
    """

    features: PatchFeatures
    images: Int64[np.ndarray, "b"]
    boxes: Boxes


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PatchEncoder:
    """A network, and how patches are encoded by it.

    Attributes:
        backbone: the network, in eval mode and on `config.device`.
        layers: some of `PATCH_LAYERS`. Where "embedding" is named beside a stage, patches pass the
            network twice.
        patch_px: side of the patches that the network sees.
        batch: number of patches that are encoded at once.
        config: device, precision, worker processes and progress bar.
    """

    backbone: Backbone
    layers: Sequence[str]
    patch_px: int
    batch: int
    config: EncodeConfig


def check_patch_settings(setting: str, *, layers: object, patch_px: object, batch: object) -> None:
    """Checks what all studies of patches have as settings, below `setting`.

    Raises:
        UsageError: one of them is wrong; the message names it and its value.
    """
    checks.some_of(f"{setting}.layers", layers, PATCH_LAYERS)
    checks.whole(f"{setting}.patch_px", patch_px)
    checks.whole(f"{setting}.batch", batch)


def patch_dims(backbone: Backbone, layers: Sequence[str]) -> dict[str, int]:
    """Returns the number of components of a patch's vector, by layer."""
    dims: dict[str, int] = dict(zip(STAGES, backbone.stage_channels, strict=True))
    dims[EMBEDDING] = backbone.embedding_dim
    return {layer: dims[layer] for layer in layers}


def encode_patches(
    encoder: PatchEncoder,
    images: ImageSet,
    keys: Sequence[SeededIndex],
    make_boxes: MakeBoxes,
    *,
    what: str,
) -> Iterator[EncodedPatches]:
    """Yields the features of the patches of images, `encoder.batch` patches at a time.

    Patches come in the order of `keys`, and for each image in the order of its boxes, whatever
    the batch and the number of worker processes are. Images that can't be read are left out and
    counted, once for all.

    Args:
        encoder: the network, and how patches are encoded by it.
        images: the images, which worker processes read at the size at which they are stored.
        keys: the index of each image, and the seed that `make_boxes` gets for it.
        make_boxes: chooses boxes. A box that is not square is stretched to a square.
        what: the text beside the progress bar.

    Raises:
        DataError: more images can't be read than `encoder.config.unreadable_share` allows.
        ValueError: a box lies not within its image, or there are more boxes than `most`.
    """
    config = encoder.config
    read = read_counted(
        images,
        _ReadWithBoxes(images=images, make_boxes=make_boxes),
        keys,
        what,
        config=config,
    )
    batches = _full_batches(_chosen_patches(read), encoder.patch_px, encoder.batch, config.device)
    for patches, part in batches:
        features = patch_features(encoder.backbone, patches, tuple(encoder.layers), config.bf16)
        yield EncodedPatches(
            features=features,
            images=part.images,
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
    boxes: Boxes

    def part(self, start: int, end: int) -> "_Chosen":
        """Returns the patches from `start` to before `end`, with all images."""
        return _Chosen(
            pixels=self.pixels,
            numbers=self.numbers[start:end],
            images=self.images[start:end],
            boxes=self.boxes[start:end],
        )


def _chosen_patches(read: Iterable[SampleBatch[_ImageWithBoxes]]) -> Iterator[_Chosen]:
    """Yields the patches of each batch of images that was read."""
    for sample_batch in read:
        samples = sample_batch.samples
        counts = [len(sample.boxes) for sample in samples]
        indices = [sample.index for sample in samples]
        boxes = [np.zeros((0, 4), dtype=np.int64), *(sample.boxes for sample in samples)]
        yield _Chosen(
            pixels=[sample.pixels for sample in samples],
            numbers=np.repeat(np.arange(len(samples)), counts),
            images=np.repeat(np.array(indices, dtype=np.int64), counts),
            boxes=np.concatenate(boxes),
        )


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
        boxes=np.concatenate([part.boxes for part in parts]),
    )
    return torch.cat([patches for patches, _ in waiting]), joined
