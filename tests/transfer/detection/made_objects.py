"""Images with bright rectangles on noise, which detectors learn quickly."""

import dataclasses

import numpy as np
from PIL import Image

from relloc.data.annotations import Objects
from relloc.errors import UnreadableImage

# The color of each class.
_COLORS = ((255, 40, 40), (40, 255, 40))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rectangles:
    """One rectangle in each image; every fifth image is a portrait, every sixth is difficult.

    Annotations of `wrong` images can't be used.
    """

    n: int
    split: str = "trainval"
    name: str = "rectangles"
    labels: None = None
    classes: tuple[str, ...] = ("red", "green")
    portraits: bool = True
    crowd: tuple[int, ...] = ()
    wrong: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.n

    def _check(self, index: int) -> None:
        if index in self.wrong:
            raise UnreadableImage(self.unusable()[index])

    def size(self, index: int) -> tuple[int, int]:
        self._check(index)
        return (72, 48) if self.portraits and index % 5 == 4 else (48, 64)

    def read(self, index: int) -> Image.Image:
        rng = np.random.default_rng(index)
        height, width = self.size(index)
        pixels = rng.integers(0, 60, (height, width, 3)).astype(np.uint8)
        for box, number in zip(*self._drawn(index), strict=True):
            left, top, right, bottom = box.astype(int)
            pixels[top:bottom, left:right] = _COLORS[number]
        return Image.fromarray(pixels)

    def objects(self, index: int) -> Objects:
        self._check(index)
        boxes, classes = self._drawn(index)
        corner, other = boxes[:, :2], boxes[:, 2:]
        sides = other - corner
        n = len(boxes)
        return Objects(
            boxes=boxes.astype(np.float32),
            xywh=np.concatenate([corner, sides], axis=1),
            classes=classes,
            difficult=np.full(n, index % 6 == 5),
            crowd=np.full(n, index in self.crowd),
            areas=sides.prod(axis=1),
        )

    def _drawn(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(1000 + index)
        left, top = rng.integers(2, 16, 2)
        width, height = rng.integers(18, 30, 2)
        boxes = np.array([[left, top, left + width, top + height]], dtype=np.float64)
        return boxes, np.array([index % 2])

    def count(self, index: int) -> int:
        return 1

    def image_id(self, index: int) -> int:
        return index

    def unusable(self) -> dict[int, str]:
        return dict.fromkeys(self.wrong, "its annotation is wrong")

    def source(self, index: int) -> str:
        return f"{self.split} {index}"

    def digest(self) -> str:
        return f"{self.n}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProposedRectangles(Rectangles):
    """Rectangles with proposals: some around the rectangle, others anywhere in the image."""

    near: int = 12
    far: int = 12

    def proposals(self, index: int) -> np.ndarray:
        rng = np.random.default_rng(2000 + index)
        height, width = self.size(index)
        last = np.array([width - 1, height - 1, width - 1, height - 1])
        boxes, _ = self._drawn(index)
        near = boxes + rng.integers(-8, 9, (self.near, 4))
        corners = rng.integers(0, last[:2] + 1, (self.far, 2, 2))
        far = np.sort(corners, axis=1).reshape(-1, 4)
        return np.concatenate([near, far]).clip(0, last).astype(np.float32)
