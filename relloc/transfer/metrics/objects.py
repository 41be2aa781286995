"""What metrics read of the objects in one image: the detected ones and the true ones."""

from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

# Corners x1 y1 x2 y2 in pixels of the original image.
Boxes = Float[np.ndarray, "n 4"]
# One mask per object, of the size of the original image.
Masks = Bool[Tensor, "n h w"] | UInt8[Tensor, "n h w"]


@runtime_checkable
class Detected(Protocol):
    """The objects that a network found in an image, on any device."""

    @property
    def boxes(self) -> Float[Tensor, "n 4"]:
        """Corners x1 y1 x2 y2 in pixels of the original image."""
        ...

    @property
    def scores(self) -> Float[Tensor, "n"]:
        """How sure the network is of each object; only their order counts."""
        ...

    @property
    def classes(self) -> Int[Tensor, "n"]:
        """The class of each object, from 0; the background is none."""
        ...

    @property
    def masks(self) -> Masks | None:
        """The pixels of each object, for a network that predicts them."""
        ...


@runtime_checkable
class TrueBoxes(Protocol):
    """The annotated objects of an image as PASCAL VOC evaluates them."""

    @property
    def boxes(self) -> Boxes:
        """Corners x1 y1 x2 y2 in pixels of the original image."""
        ...

    @property
    def classes(self) -> Int[np.ndarray, "n"]:
        """The class of each object, from 0."""
        ...

    @property
    def difficult(self) -> Bool[np.ndarray, "n"]:
        """Which objects are marked as difficult: finding them counts neither way."""
        ...


@runtime_checkable
class AnnotatedObjects(Protocol):
    """The annotated objects of an image as COCO evaluates them."""

    @property
    def xywh(self) -> Float[np.ndarray, "n 4"]:
        """Boxes x y width height as the annotation has them, in 64 bits."""
        ...

    @property
    def classes(self) -> Int[np.ndarray, "n"]:
        """The class of each object, from 0."""
        ...

    @property
    def crowd(self) -> Bool[np.ndarray, "n"]:
        """Which objects are a crowd: finding parts of it counts neither way."""
        ...

    @property
    def areas(self) -> Float[np.ndarray, "n"]:
        """The area of each object in square pixels, as the annotation has it."""
        ...
