"""How segmentation networks are tested: on the whole image, or on windows that cover it.

Both are those of mmsegmentation 0.30 (`whole_inference` and `slide_inference` in
mmseg/models/segmentors/encoder_decoder.py), with images one by one.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from relloc import checks
from relloc.transfer.resize import FittedImage, check_box, fitted_size, resized_and_normalized


@runtime_checkable
class PixelClassifier(Protocol):
    """A network in eval mode that classifies each pixel, such as `FullyConvolutionalNetwork`."""

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b classes h w"]:
        """Returns the logits of each pixel of normalized images."""
        ...

    def resized(
        self,
        logits: Float[Tensor, "b classes h w"],
        size: Sequence[int],
    ) -> Float[Tensor, "b classes h2 w2"]:
        """Returns logits at another height and width."""
        ...

    def segment(
        self,
        images: Float[Tensor, "b 3 h w"],
        out_size: Sequence[int],
    ) -> UInt8[Tensor, "b h2 w2"]:
        """Returns the most likely class of each pixel of normalized images, at another size."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class WholeImage(FittedImage):
    """Classifies all pixels of the image at once, fitted into the box (long, short) of pixels.

    Raises:
        UsageError: `box` is no such box.
    """

    @torch.no_grad()
    def class_map(
        self,
        network: PixelClassifier,
        image: UInt8[Tensor, "h w 3"],
    ) -> UInt8[Tensor, "h w"]:
        """Returns the most likely class of each pixel of an image, at its own size."""
        fitted = _fitted(image, self.box)
        own_size = image.shape[:2]
        # The batch has one image: images have different sizes.
        (class_map,) = network.segment(fitted, own_size)
        return class_map


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlidingWindows:
    """Classifies the pixels in windows that cover the image, fitted into the box (long, short).

    Windows are squares of `window_px`, `stride_px` apart; the last ones are moved so that they end
    with the image. Where windows overlap, the mean of their logits counts.

    Raises:
        UsageError: `box` is no such box, or pixels would lie between the windows.
    """

    box: Sequence[int]
    window_px: int
    stride_px: int

    def __post_init__(self) -> None:
        check_box("view.box", self.box)
        checks.whole("view.window_px", self.window_px)
        checks.whole("view.stride_px", self.stride_px)
        # A larger stride would leave pixels without a prediction.
        checks.number("view.stride_px", self.stride_px, at_most=self.window_px)

    def __str__(self) -> str:
        return (
            f"windows of {self.window_px} px, {self.stride_px} px apart, of the image fitted into "
            f"{self.box[0]} x {self.box[1]} px"
        )

    @torch.no_grad()
    def class_map(
        self,
        network: PixelClassifier,
        image: UInt8[Tensor, "h w 3"],
    ) -> UInt8[Tensor, "h w"]:
        """Returns the most likely class of each pixel of an image, at its own size."""
        logits = self.logits(network, _fitted(image, self.box))
        # The source takes a softmax before the maximum, which changes no order.
        own_size = image.shape[:2]
        (at_own_size,) = network.resized(logits, own_size)
        return at_own_size.argmax(dim=0).to(torch.uint8)

    def logits(
        self,
        network: PixelClassifier,
        images: Float[Tensor, "b 3 h w"],
    ) -> Float[Tensor, "b classes h w"]:
        """Returns the mean logits, over all windows that show it, of each pixel."""
        height, width = images.shape[-2:]
        # Made when the first logits show how many classes there are.
        total = None
        counts = images.new_zeros(height, width)
        for rows in self._windows(height):
            for columns in self._windows(width):
                window = images[:, :, rows, columns]
                window_logits = network(window)
                if total is None:
                    n_images, n_classes = window_logits.shape[:2]
                    total = window_logits.new_zeros(n_images, n_classes, height, width)
                # Logits are averaged, not probabilities, as in the source.
                total[:, :, rows, columns] += window_logits
                counts[rows, columns] += 1
        if total is None:
            raise ValueError(f"images of {height} x {width} pixels have no windows")
        # Each pixel is divided by the number of windows that show it.
        return total / counts

    def _windows(self, side: int) -> Iterator[slice]:
        """Yields the pixels of each window along an axis of `side` pixels."""
        last_start = max(side - self.window_px, 0)
        # As many steps as are needed to reach the last start, which may be a shorter one.
        n_steps = -(-last_start // self.stride_px)
        for step in range(n_steps + 1):
            start = min(step * self.stride_px, last_start)
            # An image that is smaller than a window is a window of its own.
            end = min(start + self.window_px, side)
            yield slice(start, end)


def _fitted(
    image: UInt8[Tensor, "h w 3"],
    box: Sequence[int],
) -> Float[Tensor, "1 3 h2 w2"]:
    """Returns an image as a network takes it, at the largest size that fits into the box."""
    height, width = image.shape[:2]
    size = fitted_size(height, width, box)
    (pixels,) = resized_and_normalized([image], [size])
    return pixels.unsqueeze(0)
