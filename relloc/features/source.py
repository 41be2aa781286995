"""Where an evaluation gets its features: computed once and kept, or computed again each time.

Both give the same numbers for the same image; which one serves is a matter of memory alone.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from relloc.data.image_set import ImageSet
from relloc.data.loader import Batch as ImageBatch
from relloc.data.loader import Unreadable, load
from relloc.data.views import CenterViews
from relloc.features.pool import layer_channels, layer_dims, pooled_layers
from relloc.models.backbone import Backbone
from relloc.patches.normalize import ByDataset

Features = dict[str, Float[Tensor, "b _d"]]
Batch = tuple[Features, Int[Tensor, "b"]]
ProgressBar = Callable[[Iterable[ImageBatch], str, int], Iterable[ImageBatch]]


def _silent(batches: Iterable[ImageBatch], _what: str, _total: int) -> Iterable[ImageBatch]:
    return batches


@runtime_checkable
class FeatureSource(Protocol):
    """Labeled images 0..n-1 as pooled features; `dims` numbers a layer, in `channels` channels."""

    @property
    def n(self) -> int: ...

    @property
    def n_classes(self) -> int: ...

    @property
    def dims(self) -> dict[str, int]: ...

    @property
    def channels(self) -> dict[str, int]: ...

    def batches(self, places: Int[Tensor, "m"], size: int, layers: Sequence[str]) -> Iterator[Batch]:
        """Features by layer and labels of the images at `places`, in that order, `size` at a time."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """How views are made and encoded; the same for every evaluation of a run."""

    short_px: int
    crop_px: int
    batch: int
    workers: int
    device: torch.device
    bf16: bool
    unreadable_share: float
    progress: ProgressBar = _silent

    def views(self, images: ImageSet, places: Iterable[int], size: int) -> Iterable[ImageBatch]:
        """Views of the images at `places`, `size` at a time."""
        chosen = list(places)
        batches = [chosen[start : start + size] for start in range(0, len(chosen), size)]
        views = CenterViews(images, short_px=self.short_px, crop_px=self.crop_px)
        return load(views, batches, workers=self.workers, pin=self.device.type == "cuda")

    def to_device(self, pixels: UInt8[Tensor, "b 3 s s"]) -> Float[Tensor, "b 3 s s"]:
        """Views as the network takes them."""
        return ByDataset()(pixels.to(self.device, non_blocking=True).float())


class LiveFeatures:
    """A `FeatureSource` that runs the backbone whenever it is asked; images that can't be read drop out."""

    def __init__(self, backbone: Backbone, images: ImageSet, reading: Reading) -> None:
        if images.labels is None:
            raise ValueError(f"{images.name} {images.split} has no labels")
        self.backbone = backbone
        self.images = images
        self.reading = reading
        self.n = len(images)
        self.n_classes = len(images.classes)
        self.dims = layer_dims(backbone)
        self.channels = layer_channels(backbone)
        self.unreadable = Unreadable(n_images=self.n, most_share=reading.unreadable_share)

    def batches(self, places: Int[Tensor, "m"], size: int, layers: Sequence[str]) -> Iterator[Batch]:
        labels = torch.as_tensor(self.images.labels)
        self.backbone.eval()
        loaded = self.reading.views(self.images, places.tolist(), size)
        what = f"features of {self.images.name} {self.images.split}"
        for views in self.reading.progress(loaded, what, -(-len(places) // size)):
            self.unreadable.add(views.unreadable)
            if len(views.pixels):
                pixels = self.reading.to_device(views.pixels)
                with torch.no_grad(), torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.reading.bf16):
                    features = pooled_layers(self.backbone, pixels, tuple(layers))
                yield features, labels[views.indices]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bank:
    """A `FeatureSource` kept in memory: one matrix a layer, one row an image."""

    features: dict[str, Float[Tensor, "n _d"]]
    labels: Int[Tensor, "n"]
    n_classes: int
    channels: dict[str, int]

    @property
    def n(self) -> int:
        return len(self.labels)

    @property
    def dims(self) -> dict[str, int]:
        return {layer: rows.shape[1] for layer, rows in self.features.items()}

    def batches(self, places: Int[Tensor, "m"], size: int, layers: Sequence[str]) -> Iterator[Batch]:
        for chosen in places.split(size):
            yield {layer: self.features[layer][chosen] for layer in layers}, self.labels[chosen]


def fill_bank(source: FeatureSource, layers: Sequence[str], size: int, device: torch.device) -> Bank:
    """All of a source's features of the named layers, in the memory of `device`.

    Matrices are allocated once: the peak is the bank itself and one batch.
    """
    rows = {layer: torch.empty(source.n, source.dims[layer], device=device) for layer in layers}
    labels = torch.empty(source.n, dtype=torch.int64)
    filled = 0
    for features, batch_labels in source.batches(torch.arange(source.n), size, layers):
        end = filled + len(batch_labels)
        for layer, matrix in rows.items():
            matrix[filled:end] = features[layer]
        labels[filled:end] = batch_labels
        filled = end
    return Bank(
        features={layer: matrix[:filled] for layer, matrix in rows.items()},
        labels=labels[:filled],
        n_classes=source.n_classes,
        channels=source.channels,
    )


def bank_device(gib: float, device: torch.device) -> torch.device:
    """`device` if a bank of `gib` takes less than half of its free memory, else the CPU."""
    if device.type == "cuda" and gib * 2**30 < torch.cuda.mem_get_info(device)[0] / 2:
        return device
    return torch.device("cpu")


def bank_gib(source: FeatureSource, layers: Sequence[str]) -> float:
    """Memory that `fill_bank` would take, in GiB."""
    return source.n * sum(source.dims[layer] for layer in layers) * 4 / 2**30
