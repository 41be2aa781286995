"""Sources of features for evaluations, and how images are read and encoded for them.

`LiveFeatures` computes features each time that they are asked for; `relloc.features.bank` keeps
them in memory. Both give the same numbers for the same image.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from relloc.data.device_decoding import load_to_device
from relloc.data.image_set import ImageSet
from relloc.data.loader import ImageBatch, Unreadable, load
from relloc.data.readers import never
from relloc.data.views import View, Views
from relloc.features.augment import UnitRangeImages
from relloc.features.pool import layer_channels, layer_dims, pooled_layers
from relloc.models.backbone import Backbone
from relloc.models.fused_resnet import FusedResNet, fused_if_possible
from relloc.patches.normalize import ByDataset
from relloc.results import decoder_name
from relloc.seeds import Use, seeds_for

T = TypeVar("T")
NormalizedImages = Float[Tensor, "b 3 s s"]  # what networks take: ImageNet's mean 0, deviation 1
Features = dict[str, Float[Tensor, "b _d"]]  # by layer
FeatureBatch = tuple[Features, Int[Tensor, "b *classes"]]  # features, and labels
EncodeFunction = Callable[..., Features]  # called as `encode` is
SeededIndex = tuple[int, int]  # index of an image, and seed of its random view
ViewKey = tuple[int, ...]  # these, and the seed of its random colors if it has any


@runtime_checkable
class ColorAugmentation(Protocol):
    """Changes the colors of a batch at random, by one seed for each image."""

    def draw(self, seed: int, /) -> Sequence[float]:
        """Returns the random numbers of an image."""
        ...

    def change(self, images: UnitRangeImages, drawn: Tensor, /) -> UnitRangeImages:
        """Returns the images changed by the numbers of each."""
        ...


@runtime_checkable
class ProgressBar(Protocol):
    """Passes batches on and shows progress, given what they are for and how many they are."""

    def __call__(self, batches: Iterable[T], what: str, total: int, /) -> Iterable[T]: ...


def encode(
    backbone: Backbone | FusedResNet,
    pixels: UInt8[Tensor, "b 3 s s"],
    layers: tuple[str, ...],
    bf16: bool,
    color: ColorAugmentation | None = None,
    drawn: Tensor | None = None,
) -> Features:
    """Returns pooled features of images.

    Colors are changed by `color`, if there is one, and the random numbers `drawn`. Then images are
    normalized, encoded in bfloat16 if `bf16`, and pooled in float32.

    Raises:
        ValueError: there is a `color`, and nothing was drawn for it.
    """
    images = pixels.float()
    if color is not None:
        if drawn is None:
            raise ValueError("colors are to be changed, but no random numbers came with the images")
        # Colors are changed before the normalization, as published, on values from 0 to 1.
        images = 255 * color.change(images / 255, drawn)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        normalized = ByDataset()(images)
        if bf16:
            # Convolutions would round their input anyway, in a kernel of its own.
            normalized = normalized.bfloat16()
        return pooled_layers(backbone, normalized, layers)


def no_progress(batches: Iterable[T], _what: str, _total: int) -> Iterable[T]:
    """A progress bar that shows nothing."""
    return batches


def _note_nothing(_noted: dict[str, str]) -> None:
    pass


@runtime_checkable
class FeatureSource(Protocol):
    """Labeled images, numbered from 0 to n - 1, whose pooled features can be asked for.

    A label is the number of a class. Where an image may show several classes (PASCAL VOC), it is a
    row of `n_classes` values: 1 (present), 0 (difficult) or -1 (absent).
    """

    @property
    def n(self) -> int:
        """The number of images."""
        ...

    @property
    def n_classes(self) -> int:
        """The number of classes."""
        ...

    @property
    def dims(self) -> dict[str, int]:
        """How many numbers an image has at each layer."""
        ...

    @property
    def channels(self) -> dict[str, int]:
        """The number of channels of each layer, before pooled maps were flattened."""
        ...

    def batches(
        self,
        indices: Int[Tensor, "m"],
        size: int,
        layers: Sequence[str],
        epoch: int = 0,
        epochs: int = 1,
    ) -> Iterator[FeatureBatch]:
        """Yields features by layer, and labels, of the images at `indices`.

        Images come in the given order, `size` at a time. Where views are random, each epoch has its
        own; otherwise `epoch` changes nothing. `epochs` is their number, which is only displayed.
        """
        ...


def _not_compiled(function: Any) -> Any:
    return function


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """How views of images are read and encoded; the same for all evaluations of a run.

    Attributes:
        batch: images that are encoded at once.
        workers: processes that read images.
        device: where networks compute.
        precision: "fp32", "tf32" or "bf16".
        decode: "cpu" to decode images and make views in the processes that read them, "device" to
            do so on `device`. The latter takes views that are a `CutView`.
        unreadable_share: share of images that may be unreadable before the run ends.
        share_setting: the setting by which a user sets `unreadable_share`, for messages.
        progress: shows how far reading has come.
        encode: the function `encode`, or what a compiler made of it. It is used for full batches
            only, as each other size would be compiled anew.
        fuses: whether frozen ResNets compute as a `FusedResNet`, for GPUs in bfloat16.
        compile: compiles a function of tensors of one size, or returns it as it is. Trainings use
            it for full batches.
        stopping: returns whether the run was asked to stop, for waits within a step.
        note_unreadable: is called with the names of unreadable images and the reasons, as they are
            met.
        note_left_to_cpu: is called with the names of images whose JPEGs the device can't decode,
            and that the CPU decoded, as they are met. The texts beside them are empty.
    """

    batch: int
    workers: int
    device: torch.device
    precision: str
    unreadable_share: float
    decode: str = "cpu"
    share_setting: str = "data.unreadable_share"
    progress: ProgressBar = no_progress
    encode: EncodeFunction = encode
    fuses: bool = False
    compile: Callable[[Any], Any] = _not_compiled
    stopping: Callable[[], bool] = never
    note_unreadable: Callable[[dict[str, str]], None] = _note_nothing
    note_left_to_cpu: Callable[[dict[str, str]], None] = _note_nothing

    @property
    def decoder(self) -> str:
        """The decoder of JPEGs that enters results, or "" for libjpeg, on the CPU."""
        return decoder_name(self.decode, on_gpu=self.device.type == "cuda")

    @property
    def bf16(self) -> bool:
        """Whether networks compute in bfloat16; their features are float32 all the same."""
        return self.precision == "bf16"

    def unreadable_of(self, n_images: int) -> Unreadable:
        """Returns a new counter of unreadable images among `n_images`.

        It ends the run when their share exceeds `unreadable_share`.
        """
        return Unreadable(
            n_images=n_images,
            most_share=self.unreadable_share,
            setting=self.share_setting,
            note=self.note_unreadable,
        )

    def views(
        self,
        images: ImageSet,
        view: View,
        keys: Iterable[SeededIndex],
        size: int,
    ) -> Iterable[ImageBatch]:
        """Yields views of images, `size` at a time; `keys` are taken as they are needed.

        Unreadable images are left out and named in their batch; counting them is up to the caller.
        """
        remaining = iter(keys)

        def next_keys() -> list[SeededIndex]:
            return list(itertools.islice(remaining, size))

        # This form of `iter` calls `next_keys` until it returns an empty list.
        return self._load(images, view, iter(next_keys, []))

    def read(
        self,
        images: ImageSet,
        view: View,
        batches: Iterable[list[Any]],
        n_batches: int,
        what: str,
        unreadable: Unreadable | None = None,
        color: ColorAugmentation | None = None,
    ) -> Iterator[ImageBatch]:
        """Yields views of images in the given batches of keys, some of which may be empty.

        A key is a `SeededIndex`, or with a `color` a `ViewKey`, and batches have the numbers that
        `color` draws. `what` is the text beside the progress bar. `unreadable` counts unreadable
        images; by default that is a new counter.

        Raises:
            DataError: more images can't be read than `unreadable` allows.
        """
        unreadable = unreadable or self.unreadable_of(len(images))
        loaded = self._load(images, view, batches, color)
        for batch in self.progress(loaded, what, n_batches):
            unreadable.add(batch.unreadable)
            yield batch

    def _load(
        self,
        images: ImageSet,
        view: View,
        batches: Iterable[list[Any]],
        color: ColorAugmentation | None = None,
    ) -> Iterator[ImageBatch]:
        views = Views(images, view, color.draw if color else None)
        if self.decode == "device":

            def note_failed(indices: Sequence[int]) -> None:
                self.note_left_to_cpu(dict.fromkeys(map(images.source, indices), ""))

            return load_to_device(
                views,
                batches,
                workers=self.workers,
                device=self.device,
                stopping=self.stopping,
                note_failed=note_failed,
            )
        return load(
            views,
            batches,
            workers=self.workers,
            # From page-locked memory copies to a GPU run beside computation.
            pin=self.device.type == "cuda",
            stopping=self.stopping,
        )

    def to_device(self, pixels: UInt8[Tensor, "b 3 s s"]) -> NormalizedImages:
        """Returns images on the device, normalized as networks take them."""
        # Bytes are copied, and become floating-point numbers there: a quarter of the traffic.
        images = pixels.to(self.device, non_blocking=True).float()
        return ByDataset()(images)


class LiveFeatures:
    """A `FeatureSource` that encodes images each time they are asked for.

    That takes little memory and more time; with random views there is no other way.

    Args:
        backbone: a network on `encode_config.device`; `batches` puts it into evaluation mode.
        images: the images, in `view`.
        labels: labels (n, or n x classes) in place of the images' own.
        color: random color changes, applied on the device.
        seed: of all random numbers of views and colors.

    Raises:
        ValueError: neither the images nor `labels` have labels.
    """

    def __init__(
        self,
        backbone: Backbone,
        images: ImageSet,
        encode_config: EncodeConfig,
        view: View,
        *,
        labels: Int[Tensor, "n *classes"] | None = None,
        color: ColorAugmentation | None = None,
        seed: int = 0,
    ) -> None:
        if labels is None and images.labels is None:
            raise ValueError(
                f"{images.name} {images.split} has no labels, but features need labels beside them"
            )
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
        self,
        indices: Int[Tensor, "m"],
        size: int,
        layers: Sequence[str],
        epoch: int = 0,
        epochs: int = 1,
    ) -> Iterator[FeatureBatch]:
        for features, views in self.batches_with_views(indices, size, layers, epoch, epochs):
            yield features, self.labels[views.indices]

    def batches_with_views(
        self,
        indices: Int[Tensor, "m"],
        size: int,
        layers: Sequence[str],
        epoch: int = 0,
        epochs: int = 1,
    ) -> Iterator[tuple[Features, ImageBatch]]:
        """Yields the features that `batches` yields, with the views that they are of.

        So an evaluation that needs more than pooled features reads images once.
        """
        # Batch norm has to use its running statistics, whatever the caller did before.
        self.backbone.eval()
        backbone: Backbone | FusedResNet = self.backbone
        # Made anew for each pass over the images: weights may have changed meanwhile.
        if self.encode_config.fuses:
            backbone = fused_if_possible(backbone)
        batches = indices.split(size)
        # A generator, so that seeds are computed as batches are read, not all of an epoch at first.
        keys = (self._keys(batch, epoch) for batch in batches)
        what = f"features of {self.images.name} {self.images.split}"
        if epochs > 1:
            what += f", epoch {epoch + 1} of {epochs}"
        read = self.encode_config.read(
            self.images,
            self.view,
            keys,
            len(batches),
            what,
            self.unreadable,
            self.color,
        )
        for views in read:
            # A batch may be empty, as no image of it could be read.
            if len(views.pixels):
                yield self._encode(backbone, views, size, layers), views

    def _keys(self, indices: Int[Tensor, "m"], epoch: int) -> list[ViewKey]:
        """Returns each image with its seeds, which depend on image and epoch alone."""
        images = indices.tolist()
        columns = [images, seeds_for(Use.AUGMENTED_VIEW, self.seed, epoch, last=images)]
        if self.color:
            columns.append(seeds_for(Use.AUGMENTED_COLOR, self.seed, epoch, last=images))
        return list(zip(*columns, strict=True))

    @torch.no_grad()
    def _encode(
        self,
        backbone: Backbone | FusedResNet,
        views: ImageBatch,
        size: int,
        layers: Sequence[str],
    ) -> Features:
        device = self.encode_config.device
        pixels = views.pixels.to(device, non_blocking=True)
        drawn = views.drawn
        if drawn is not None and device.type == "cuda":
            # Without page-locked memory the host waits for everything that is queued on the GPU.
            drawn = drawn.pin_memory().to(device, non_blocking=True)
        # A compiled function serves one size, and would be compiled anew for another.
        encode_images = self.encode_config.encode if len(pixels) == size else encode
        return encode_images(
            backbone,
            pixels,
            tuple(layers),
            self.encode_config.bf16,
            self.color,
            drawn,
        )
