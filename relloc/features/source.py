"""Where an evaluation gets its features: computed once and kept, or computed again each time.

Both give the same numbers for the same image; which one serves is a matter of memory alone.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import psutil
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from relloc.data.image_set import ImageSet
from relloc.data.loader import ImageBatch, Unreadable, load
from relloc.data.readers import never
from relloc.data.views import View, Views
from relloc.errors import DataError, UsageError
from relloc.features.pool import layer_channels, layer_dims, pooled_layers
from relloc.models.backbone import Backbone
from relloc.patches.normalize import ByDataset
from relloc.seeds import Use, seed_for

Pixels = Float[Tensor, "b 3 s s"]
Features = dict[str, Float[Tensor, "b _d"]]
Batch = tuple[Features, Int[Tensor, "b *classes"]]
# Changes pixels between 0 and 1 by the chance of one seed an image
Color = Callable[[Pixels, Sequence[int]], Pixels]
ProgressBar = Callable[[Iterable[ImageBatch], str, int], Iterable[ImageBatch]]
Encode = Callable[[Backbone, Pixels, tuple[str, ...], bool], Features]


def encode(backbone: Backbone, images: Pixels, layers: tuple[str, ...], bf16: bool) -> Features:
    """Pooled features of images of 0 to 255: normalized, encoded in bfloat16 if asked, pooled in float32."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        return pooled_layers(backbone, ByDataset()(images), layers)


def _silent(batches: Iterable[ImageBatch], _what: str, _total: int) -> Iterable[ImageBatch]:
    return batches


def _ignore(_reasons: dict[str, str]) -> None:
    pass


@runtime_checkable
class FeatureSource(Protocol):
    """Labeled images 0..n-1 as pooled features; `dims` numbers a layer, in `channels` channels.

    A label is the number of a class; or, where an image may show several (PASCAL VOC), a row of
    `n_classes` of 1 (there), 0 (difficult) and -1 (not there).
    """

    @property
    def n(self) -> int: ...

    @property
    def n_classes(self) -> int: ...

    @property
    def dims(self) -> dict[str, int]: ...

    @property
    def channels(self) -> dict[str, int]: ...

    def batches(
        self, indices: Int[Tensor, "m"], size: int, layers: Sequence[str], epoch: int = 0, epochs: int = 1
    ) -> Iterator[Batch]:
        """Features by layer and labels of the images at `indices`, in that order, `size` at a time.

        Where views are random, each epoch has its own; else `epoch` changes nothing. `epochs` is how
        many there are, which only progress tells.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """How views are read and encoded; the same for every evaluation of a run.

    `share_setting` is what a user sets `unreadable_share` by. `precision` is "fp32", "tf32" or "bf16".
    `encode` is the function of that name, or what a compiler made of it; it serves full batches, as each
    other size would be compiled anew. `stopping` says whether the run was asked to stop, where that is
    otherwise looked at between steps only. `note_unreadable` is told as they are met which images can't be used, and
    why.
    """

    batch: int
    workers: int
    device: torch.device
    precision: str
    unreadable_share: float
    share_setting: str = "data.unreadable_share"
    progress: ProgressBar = _silent
    encode: Encode = encode
    stopping: Callable[[], bool] = never
    note_unreadable: Callable[[dict[str, str]], None] = _ignore

    @property
    def bf16(self) -> bool:
        """Whether networks compute in bfloat16; their features are float32 all the same."""
        return self.precision == "bf16"

    def unreadable_of(self, n_images: int) -> Unreadable:
        """The count of those of `n_images` that can't be used, which ends the run beyond `unreadable_share`."""
        return Unreadable(
            n_images=n_images,
            most_share=self.unreadable_share,
            setting=self.share_setting,
            note=self.note_unreadable,
        )

    def views(self, images: ImageSet, view: View, keys: Iterable[tuple[int, int]], size: int) -> Iterable[ImageBatch]:
        """Views by (image, seed of its chance), `size` at a time; keys are asked for as they are needed."""
        left = iter(keys)
        return self._load(images, view, iter(lambda: list(itertools.islice(left, size)), []))

    def read(
        self,
        images: ImageSet,
        view: View,
        batches: Iterable[list[tuple[int, int]]],
        n_batches: int,
        what: str,
        unreadable: Unreadable | None = None,
    ) -> Iterator[ImageBatch]:
        """The same in given batches, of which some may be empty; progress calls them `what`.

        Raises:
            DataError: more images than `unreadable` allows can't be read, by default more than `unreadable_share`.
        """
        unreadable = unreadable or self.unreadable_of(len(images))
        for views in self.progress(self._load(images, view, batches), what, n_batches):
            unreadable.add(views.unreadable)
            yield views

    def _load(self, images: ImageSet, view: View, batches: Iterable[list[tuple[int, int]]]) -> Iterator[ImageBatch]:
        pin = self.device.type == "cuda"
        return load(Views(images, view), batches, workers=self.workers, pin=pin, stopping=self.stopping)

    def to_device(self, pixels: UInt8[Tensor, "b 3 s s"]) -> Pixels:
        """Views as the network takes them."""
        return ByDataset()(pixels.to(self.device, non_blocking=True).float())


class LiveFeatures:
    """A `FeatureSource` that encodes images each time they are asked for: little memory, more time.

    `backbone` is on `encode_config.device`. `labels` (n, or n x classes) are the images' own unless given.
    """

    def __init__(
        self,
        backbone: Backbone,
        images: ImageSet,
        encode_config: EncodeConfig,
        view: View,
        *,
        labels: Int[Tensor, "n *classes"] | None = None,
        color: Color | None = None,
        seed: int = 0,
    ) -> None:
        if labels is None and images.labels is None:
            raise ValueError(f"{images.name} {images.split} has no labels")
        self.backbone = backbone
        self.images = images
        self.encode_config = encode_config
        self.view = view
        self.labels = torch.as_tensor(images.labels) if labels is None else labels
        self.color = color
        self.seed = seed
        self.n = len(images)
        self.n_classes = len(images.classes)
        self.dims = layer_dims(backbone)
        self.channels = layer_channels(backbone)
        self.unreadable = encode_config.unreadable_of(self.n)

    def batches(
        self, indices: Int[Tensor, "m"], size: int, layers: Sequence[str], epoch: int = 0, epochs: int = 1
    ) -> Iterator[Batch]:
        self.backbone.eval()
        parts = indices.split(size)
        keys = (
            [(index, seed_for(Use.AUGMENTED_VIEW, self.seed, epoch, index)) for index in part.tolist()]
            for part in parts
        )
        what = f"features of {self.images.name} {self.images.split}"
        what += f", epoch {epoch + 1} of {epochs}" if epochs > 1 else ""
        for views in self.encode_config.read(self.images, self.view, keys, len(parts), what, self.unreadable):
            if len(views.pixels):
                yield self._encode(views, size, layers, epoch), self.labels[views.indices]

    @torch.no_grad()
    def _encode(self, views: ImageBatch, size: int, layers: Sequence[str], epoch: int) -> Features:
        images = views.pixels.to(self.encode_config.device, non_blocking=True).float()
        if self.color:
            seeds = [seed_for(Use.AUGMENTED_COLOR, self.seed, epoch, index) for index in views.indices.tolist()]
            images = 255 * self.color(images / 255, seeds)
        way = self.encode_config.encode if len(images) == size else encode
        return way(self.backbone, images, tuple(layers), self.encode_config.bf16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bank:
    """A `FeatureSource` kept in memory: one matrix a layer, one row an image."""

    features: dict[str, Float[Tensor, "n _d"]]
    labels: Int[Tensor, "n *classes"]
    n_classes: int
    channels: dict[str, int]

    @property
    def n(self) -> int:
        return len(self.labels)

    @property
    def dims(self) -> dict[str, int]:
        return {layer: rows.shape[1] for layer, rows in self.features.items()}

    def batches(
        self, indices: Int[Tensor, "m"], size: int, layers: Sequence[str], epoch: int = 0, epochs: int = 1
    ) -> Iterator[Batch]:
        for chosen in indices.split(size):
            yield {layer: self.features[layer][chosen] for layer in layers}, self.labels[chosen]


def fill_bank(
    source: FeatureSource,
    layers: Sequence[str],
    size: int,
    device: torch.device,
    indices: Int[Tensor, "m"] | None = None,
) -> Bank:
    """A source's features of the named layers, in the memory of `device`: of all images, or of those at `indices`.

    Matrices are allocated once: the peak is the bank itself and one batch.

    Raises:
        DataError: none of the images can be read.
        UsageError: there is no room for that.
    """
    indices = torch.arange(source.n) if indices is None else indices
    needed, free = bank_gib(source, layers, len(indices)), free_gib(device)
    full = UsageError(
        f"features of {len(indices)} images at {', '.join(layers)} take {in_gib(needed)}, and the memory of {device} "
        f"has {in_gib(free)} free: name fewer layers, take a smaller data set, or free memory"
    )
    if needed > free:
        raise full
    try:
        rows = {layer: torch.empty(len(indices), source.dims[layer], device=device) for layer in layers}
    except RuntimeError as error:  # an allocator that is asked for too much raises nothing narrower
        raise full from error
    labels = []
    filled = 0
    for features, batch_labels in source.batches(indices, size, layers):
        end = filled + len(batch_labels)
        for layer, matrix in rows.items():
            matrix[filled:end] = features[layer]
        labels.append(batch_labels)
        filled = end
    if not labels:
        raise DataError("none of the images can be read: there are no features to evaluate")
    return Bank(
        features={layer: matrix[:filled] for layer, matrix in rows.items()},
        labels=torch.cat(labels),
        n_classes=source.n_classes,
        channels=source.channels,
    )


def bank_device(gib: float, device: torch.device) -> torch.device:
    """`device` if a bank of `gib` takes less than half of its free memory, else the CPU."""
    if device.type == "cuda" and gib < free_gib(device) / 2:
        return device
    return torch.device("cpu")


def bank_gib(source: FeatureSource, layers: Sequence[str], n: int | None = None) -> float:
    """Memory that `fill_bank` would take for `n` images, or all, in GiB."""
    values = sum(source.dims[layer] for layer in layers) * (source.n if n is None else n)
    return values * 4 / 2**30


def free_gib(device: torch.device) -> float:
    """Memory of `device` that can still be taken, in GiB: of a CPU what Linux calls available, caches included."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**30
    return psutil.virtual_memory().available / 2**30


def in_gib(gib: float) -> str:
    """Words that keep three digits of however little."""
    return f"{gib:.3g} GiB" if gib < 100 else f"{gib:.0f} GiB"
