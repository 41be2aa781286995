import dataclasses
import random
import re
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from relloc.data.crops import Crops
from relloc.errors import UnreadableImage
from relloc.geometry import Area, PatchGrid, ShortSide
from relloc.seeds import Use, seed_for

SIZES = {"patch_px": 8, "gap_px": 2, "jitter_px": 1}
SPAN = 30
AS_IT_IS = PatchGrid(**SIZES, resize=None)


@dataclasses.dataclass(frozen=True)
class Places:
    """Images whose red and green say row and column of each pixel, and whose blue says the image.

    `sizes` are (height, width), None for an image that can't be read.
    """

    sizes: Sequence[tuple[int, int] | None]
    name: str = "places"
    split: str = "train"
    labels: Sequence[int] | None = None
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.sizes)

    def read(self, index: int) -> Image.Image:
        size = self.sizes[index]
        if size is None:
            raise UnreadableImage("is an empty file")
        rows, columns = np.mgrid[: size[0], : size[1]]
        return Image.fromarray(
            np.stack([rows, columns, np.full(size, index)], axis=2).astype(np.uint8)
        )

    def source(self, index: int) -> str:
        return f"/photos/{index}.jpg"

    def digest(self) -> str:
        return "0" * 16


def crops_of(images: Places, grid: PatchGrid, *, centered: bool) -> Crops:
    return Crops(images, grid, use=Use.CROP, seed=0, centered=centered)


def copy_folder(pixels: np.ndarray) -> tuple[int, int]:
    """Corner of a crop; the rest of it must follow from there."""
    assert pixels.shape == (SPAN, SPAN, 3)
    assert pixels.dtype == np.uint8
    top, left = map(int, pixels[0, 0, :2])
    rows, columns = np.mgrid[:SPAN, :SPAN]
    assert np.array_equal(pixels[..., 0], rows + top)
    assert np.array_equal(pixels[..., 1], columns + left)
    return top, left


def test_an_index_and_a_seed_decide_the_crop() -> None:
    crops = crops_of(Places([(80, 60), (90, 50)]), AS_IT_IS, centered=False)
    first, other_seed, other_image = crops[0, 7], crops[0, 8], crops[1, 7]
    assert first.index == 0
    assert first.unreadable == {}
    again = crops_of(Places([(80, 60), (90, 50)]), AS_IT_IS, centered=False)[0, 7]
    assert np.array_equal(again.pixels, first.pixels)
    assert copy_folder(other_seed.pixels) != copy_folder(first.pixels)
    assert other_image.index == 1
    assert (other_image.pixels[..., 2] == 1).all()


def test_random_crops_reach_every_edge_evenly() -> None:
    crops = crops_of(Places([(SPAN + 3, SPAN + 9)]), AS_IT_IS, centered=False)
    corners = np.array([copy_folder(crops[0, seed].pixels) for seed in range(2000)])
    for values, n in zip(corners.T, (4, 10), strict=True):
        counts = np.bincount(values, minlength=n)
        assert len(counts) == n
        assert np.abs(counts - 2000 / n).max() < 4.5 * (2000 / n) ** 0.5
    assert abs(np.corrcoef(corners.T)[0, 1]) < 0.1


@pytest.mark.parametrize("size", [(40, 50), (90, 120)])  # only cut, and reduced first
@pytest.mark.parametrize("resize", [None, ShortSide(px=40)])
def test_every_other_crop_is_mirrored_in_its_place(
    size: tuple[int, int], resize: ShortSide | None
) -> None:
    grid = PatchGrid(**SIZES, resize=resize)
    crops = crops_of(Places([size]), grid, centered=False)
    flipped = dataclasses.replace(crops, flip=0.5)
    n_mirrored = 0
    for seed in range(400):
        plain = crops[0, seed].pixels
        pixels = flipped[0, seed].pixels
        is_mirrored = np.array_equal(pixels, plain[:, ::-1])
        assert is_mirrored != np.array_equal(pixels, plain)
        n_mirrored += is_mirrored
    assert abs(n_mirrored - 200) < 4.5 * 100**0.5


def test_centered_crops_are_never_mirrored() -> None:
    crops = dataclasses.replace(crops_of(Places([(40, 50)]), AS_IT_IS, centered=True), flip=1.0)
    assert copy_folder(crops[0, 0].pixels) == (5, 10)


@pytest.mark.parametrize(
    ("size", "middle"),
    [((30, 30), (0, 0)), ((50, 70), (10, 20)), ((51, 70), (10, 20)), ((255, 31), (112, 0))],
)
def test_centered_crops_are_the_middle_whatever_the_seed(
    size: tuple[int, int], middle: tuple[int, int]
) -> None:
    crops = crops_of(Places([size]), AS_IT_IS, centered=True)
    assert {copy_folder(crops[0, seed].pixels) for seed in range(5)} == {middle}


def test_a_crop_is_part_of_the_resized_image() -> None:
    places = Places([(90, 120)])
    crops = crops_of(places, PatchGrid(**SIZES, resize=ShortSide(px=45)), centered=True)
    resized = F.resize(places.read(0), [45], InterpolationMode.BILINEAR, antialias=True)
    expected = np.asarray(F.crop(resized, 7, 15, SPAN, SPAN))
    assert np.abs(crops[0, 0].pixels.astype(int) - expected).max() <= 1


def test_the_seed_also_decides_the_size_where_the_grid_draws_it() -> None:
    grid = PatchGrid(**SIZES, resize=Area(low_px2=1000, high_px2=40_000))
    crops = crops_of(Places([(200, 200)]), grid, centered=True)
    steps = [np.ptp(crops[0, seed].pixels[..., 0].astype(int)) for seed in range(300)]
    assert np.array_equal(crops[0, 5].pixels, crops[0, 5].pixels)
    assert min(steps) < 35  # hardly reduced: 30 px of 200
    assert max(steps) > 130  # reduced to 31..43 px


def test_an_unreadable_image_is_replaced_by_the_next_and_named() -> None:
    crops = crops_of(Places([(40, 40), None, None, (50, 50)]), AS_IT_IS, centered=False)
    sample = crops[1, 0]
    assert sample.index == 3
    assert sample.pixels is not None
    assert sample.unreadable == {
        "/photos/1.jpg": "is an empty file",
        "/photos/2.jpg": "is an empty file",
    }
    assert crops[0, 0].unreadable == {}


def test_no_image_stands_in_for_one_that_is_asked_about() -> None:
    sample = crops_of(Places([(40, 40), None, (50, 50)]), AS_IT_IS, centered=True)[1, 0]
    assert (sample.index, sample.pixels) == (1, None)
    assert sample.unreadable == {"/photos/1.jpg": "is an empty file"}


def test_after_the_last_image_comes_the_first() -> None:
    sample = crops_of(Places([(40, 40), None]), AS_IT_IS, centered=False)[1, 0]
    assert (sample.index, list(sample.unreadable)) == (0, ["/photos/1.jpg"])


def test_an_image_too_small_for_the_grid_is_named_with_the_numbers() -> None:
    sample = crops_of(Places([(29, 44), (40, 40)]), AS_IT_IS, centered=False)[0, 0]
    assert sample.index == 1
    ((path, reason),) = sample.unreadable.items()
    assert path == "/photos/0.jpg"
    assert re.search(r"\b44x29 px\b.*\b30 px\b", reason)


@pytest.mark.parametrize(("n", "tried"), [(1, 1), (3, 3), (80, 50)])
def test_where_no_image_near_can_be_read_all_tried_are_named(n: int, tried: int) -> None:
    sample = crops_of(Places([None] * n), AS_IT_IS, centered=False)[0, 0]
    assert (sample.index, sample.pixels, len(sample.unreadable)) == (0, None, tried)


def test_there_are_as_many_crops_as_images() -> None:
    assert len(crops_of(Places([(40, 40)] * 3), AS_IT_IS, centered=False)) == 3


def test_an_image_gets_another_crop_in_every_epoch_from_a_seed_of_its_use() -> None:
    crops = Crops(Places([(90, 80)] * 3), AS_IT_IS, use=Use.CROP, seed=5, centered=False)
    for index, epoch in ((0, 0), (0, 1), (2, 1)):
        rng = random.Random(seed_for(Use.CROP, 5, epoch, index))
        rng.random()  # of the size, which this grid leaves
        assert copy_folder(crops[index, epoch].pixels) == (
            rng.randint(0, 90 - SPAN),
            rng.randint(0, 80 - SPAN),
        )
