"""Images of one size that all have the same boxes."""

import dataclasses

import numpy as np
from PIL import Image

from relloc.data.annotations import Objects


@dataclasses.dataclass(frozen=True, kw_only=True)
class Boxed:
    """`boxes` are x, y, width and height of the objects of each image, all of the first class."""

    boxes: tuple[tuple[float, ...], ...]
    n: int = 1
    height: int = 100
    width: int = 100
    difficult: tuple[bool, ...] = ()
    crowd: tuple[bool, ...] = ()
    occluded: tuple[bool, ...] | None = None
    split: str = "test"
    name: str = "boxed"
    labels: None = None
    classes: tuple[str, ...] = ("thing", "other")

    def __len__(self) -> int:
        return self.n

    def read(self, index: int) -> Image.Image:
        rng = np.random.default_rng(index)
        return Image.fromarray(rng.integers(255, size=(self.height, self.width, 3), dtype=np.uint8))

    def objects(self, index: int) -> Objects:
        n = len(self.boxes)
        xywh = np.array(self.boxes, dtype=np.float64).reshape(n, 4)
        none = np.zeros(n, dtype=bool)
        return Objects(
            boxes=xywh.astype(np.float32),
            xywh=xywh,
            classes=np.zeros(n, dtype=np.int64),
            difficult=np.array(self.difficult, dtype=bool) if self.difficult else none,
            crowd=np.array(self.crowd, dtype=bool) if self.crowd else none,
            areas=xywh[:, 2] * xywh[:, 3],
            occluded=None if self.occluded is None else np.array(self.occluded, dtype=bool),
        )

    def count(self, index: int) -> int:
        return len(self.boxes)

    def size(self, index: int) -> tuple[int, int]:
        return self.height, self.width

    def image_id(self, index: int) -> int:
        return index

    def unusable(self) -> dict[int, str]:
        return {}

    def source(self, index: int) -> str:
        return f"{index}.png"

    def digest(self) -> str:
        return "boxed"
