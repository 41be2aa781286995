import random
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional

from relloc.data.folder import FolderImages
from relloc.data.photos import read_photo
from relloc.data.views import (
    Center,
    RandomCrop,
    RandomResized,
    RandomSquare,
    Squash,
    View,
    Views,
    check_view,
)
from relloc.errors import UsageError

SIZES = [
    (300, 400),
    (400, 300),
    (256, 256),
    (500, 333),
    (333, 501),
    (100, 120),
    (375, 500),
    (40, 2000),
    (2000, 41),
]
VIEWS = [
    Center(short_px=64, crop_px=56),
    Squash(short_px=64, side_px=56),
    RandomResized(crop_px=56),
    RandomCrop(short_px=64, crop_px=56),
    RandomSquare(crop_px=56),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> FolderImages:
    folder, rng = tmp_path_factory.mktemp("views"), np.random.default_rng(0)
    for number, (height, width) in enumerate(SIZES):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.ppm")
    return FolderImages(name="mine", split="val", paths=sorted(map(str, folder.iterdir())))


def tensor(image: Image.Image) -> Tensor:
    return functional.pil_to_tensor(image)


def planes(pixels: np.ndarray) -> Tensor:
    """Pixels of a view, (s s 3), as torchvision has them, (3 s s)."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def check_within_rounding(found: Tensor, expected: Tensor) -> None:
    difference = (found.int() - expected.int()).abs()
    assert (
        difference.max() <= 2
    )  # torchvision rounds after each axis; in noise that adds up now and then
    assert (difference > 1).float().mean() < 1e-4


@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_a_view_is_a_function_of_image_and_seed(images: FolderImages, view: View) -> None:
    views, side = Views(images, view), 56
    assert len(views) == len(SIZES)
    for index in range(len(views)):
        sample = views[index, 7]
        assert (sample.index, sample.unreadable) == (index, {})
        assert sample.pixels is not None
        assert sample.pixels.shape == (side, side, 3)
        assert sample.pixels.flags.c_contiguous  # as decoders leave them
        assert np.array_equal(views[index, 7].pixels, sample.pixels)
    still = isinstance(view, Center | Squash)
    assert np.array_equal(views[0, 7].pixels, views[0, 8].pixels) == still


@pytest.mark.parametrize("sides", [(256, 224), (96, 81), (64, 64)])
def test_center_is_torchvisions_resize_and_center_crop(
    images: FolderImages, sides: Sequence[int]
) -> None:
    short_px, crop_px = sides
    oracle = transforms.Compose(
        [transforms.Resize(short_px), transforms.CenterCrop(crop_px), transforms.PILToTensor()]
    )
    views = Views(images, Center(short_px=short_px, crop_px=crop_px))
    for index in range(len(views)):
        check_within_rounding(planes(views[index, 0].pixels), oracle(images.read(index)))


@pytest.mark.parametrize("photo", ["chelsea", "coffee", "hubble"])
def test_on_photographs_the_center_is_torchvisions_within_one_gray_level(photo: str) -> None:
    image = read_photo(photo)
    oracle = transforms.Compose(
        [transforms.Resize(256), transforms.CenterCrop(224), transforms.PILToTensor()]
    )
    found = planes(Center(short_px=256, crop_px=224)(image, random.Random(0)))
    assert (found.int() - oracle(image).int()).abs().max() <= 1


def test_squash_is_two_resizes_of_torchvision_bit_for_bit(images: FolderImages) -> None:
    oracle = transforms.Compose(
        [transforms.Resize(96), transforms.Resize((81, 81)), transforms.PILToTensor()]
    )
    for index in range(len(images)):
        image = images.read(index)
        assert torch.equal(
            planes(Squash(short_px=96, side_px=81)(image, random.Random(0))), oracle(image)
        )


def test_a_random_resized_view_is_torchvisions_of_the_same_box_bit_for_bit(
    images: FolderImages,
) -> None:
    view = RandomResized(crop_px=56, flip=0)
    flipped = RandomResized(crop_px=56, flip=1)
    for index in range(len(images)):
        image = images.read(index)
        top, left, bottom, right = view.box(image.height, image.width, random.Random(index))
        box = (top, left, bottom - top, right - left)
        expected = tensor(functional.resized_crop(image, *box, size=[56, 56]))
        assert torch.equal(planes(view(image, random.Random(index))), expected)
        assert torch.equal(planes(flipped(image, random.Random(index))), expected.flip(2))


@pytest.mark.parametrize("size", [(300, 400), (60, 45)])
def test_random_boxes_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    view, blank = RandomResized(crop_px=8), torch.empty(1, *size)
    ours, theirs = [], []
    for seed in range(3000):
        top, left, bottom, right = view.box(*size, random.Random(seed))
        ours.append((top, left, bottom - top, right - left))
        theirs.append(
            transforms.RandomResizedCrop.get_params(blank, list(view.scale), list(view.ratio))
        )
    for mine, others in zip(np.array(ours).T, np.array(theirs).T, strict=True):
        assert stats.ks_2samp(mine, others).pvalue > 1e-3
    areas, other_areas = (np.array(boxes)[:, 2:].prod(axis=1) for boxes in (ours, theirs))
    assert stats.ks_2samp(areas, other_areas).pvalue > 1e-3
    assert areas.min() / np.prod(size) == pytest.approx(0.08, abs=0.01)


@pytest.mark.parametrize("size", [(2000, 41), (41, 2000), (1, 900), (3, 1)])
def test_where_no_box_fits_it_is_torchvisions_middle(size: tuple[int, int]) -> None:
    view = RandomResized(
        crop_px=8, scale=(1.0, 1.0)
    )  # only a box of the image's own aspect would fit
    top, left, bottom, right = view.box(*size, random.Random(0))
    expected = transforms.RandomResizedCrop.get_params(
        torch.empty(1, *size), [1.0, 1.0], [3 / 4, 4 / 3]
    )
    assert (top, left, bottom - top, right - left) == expected


def test_a_random_crop_lies_in_the_central_square_and_reaches_all_of_it(
    images: FolderImages,
) -> None:
    view = RandomCrop(short_px=64, crop_px=56, flip=0)
    image = images.read(4)
    square = transforms.Compose(
        [transforms.Resize(64), transforms.CenterCrop(64), transforms.PILToTensor()]
    )(image)
    corners = set()
    for seed in range(300):
        rng = random.Random(seed)
        row, column = rng.randint(0, 8), rng.randint(0, 8)
        check_within_rounding(
            planes(view(image, random.Random(seed))),
            square[:, row : row + 56, column : column + 56],
        )
        corners.add((row, column))
    assert {row for row, _ in corners} == {column for _, column in corners} == set(range(9))
    assert len(corners) > 70  # of 81
    mirrored = RandomCrop(short_px=64, crop_px=56, flip=1)(image, random.Random(3))
    assert np.array_equal(mirrored, view(image, random.Random(3))[:, ::-1])


@pytest.mark.parametrize("size", SIZES)
def test_a_random_square_lies_in_the_image_and_has_the_published_sizes(
    size: tuple[int, int],
) -> None:
    height, width = size
    view = RandomSquare(crop_px=227)
    rng = random.Random(0)
    boxes = np.array([view.box(height, width, rng) for _ in range(2000)])
    sides = boxes[:, 2:] - boxes[:, :2]
    assert np.allclose(sides[:, 0], sides[:, 1])
    assert boxes.min() >= 0
    assert (boxes[:, 2:] <= [height, width]).all()
    # Caffe's TransformationLayer: uniform from half of 227 px up to twice as many, in the image.
    largest = min(2 * 227, height, width)
    smallest = min(0.5 * 227, largest)
    if largest > smallest:
        uniform = stats.uniform(smallest, largest - smallest)
        assert stats.kstest(sides[:, 0], uniform.cdf).pvalue > 1e-3
    # All places that the square can have are equally likely.
    free = width - sides[:, 0]
    places = boxes[free > 1e-6, 1] / free[free > 1e-6]
    if len(places):
        assert stats.kstest(places, "uniform").pvalue > 1e-3


def test_a_random_square_is_interpolated_linearly_between_pixel_centers() -> None:
    # Red rises from column to column and green from row to row, so that values say where they are.
    rows, columns = np.mgrid[0:60, 0:80].astype(np.uint8)
    image = Image.fromarray(np.stack([3 * columns, 4 * rows, 0 * rows], axis=2))
    view = RandomSquare(crop_px=16, scale=(0.5, 3.0), flip=0.0)
    for seed in range(20):
        top, left, bottom, right = view.box(60, 80, random.Random(seed))
        pixels = view(image, random.Random(seed))
        centers = (np.arange(16) + 0.5) / 16
        x = np.clip(left + (right - left) * centers - 0.5, 0, 79)
        y = np.clip(top + (bottom - top) * centers - 0.5, 0, 59)
        assert np.abs(pixels[5, :, 0] - 3 * x).max() <= 1
        assert np.abs(pixels[:, 5, 1] - 4 * y).max() <= 1


@pytest.mark.parametrize(
    "view", [RandomResized(crop_px=8), RandomCrop(short_px=8, crop_px=8)], ids=str
)
def test_half_of_the_random_views_are_flipped(view: View) -> None:
    ramp = Image.fromarray(
        np.repeat(np.arange(0, 240, 4, dtype=np.uint8)[None, :, None], 60, axis=0).repeat(3, axis=2)
    )
    flips = sum(
        bool(pixels[4, 0, 0] > pixels[4, -1, 0])
        for pixels in (view(ramp, random.Random(n)) for n in range(600))
    )
    assert 250 < flips < 350  # four standard errors


def test_an_unreadable_image_has_no_view_but_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "empty.jpg"
    path.touch()
    views = Views(
        FolderImages(name="mine", split="val", paths=[str(path)]), Center(short_px=256, crop_px=224)
    )
    sample = views[0, 5]
    assert (sample.index, sample.pixels, sample.unreadable) == (
        0,
        None,
        {str(path): "is an empty file"},
    )


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (
            Center,
            {"short_px": 256, "crop_px": 257},
            r"view.crop_px 257 is larger than view.short_px 256",
        ),
        (
            RandomCrop,
            {"short_px": 256, "crop_px": 257},
            r"view.crop_px 257 is larger than view.short_px 256",
        ),
        (
            Center,
            {"short_px": 256, "crop_px": 0},
            r"view.crop_px is 0: .* 1 or more",
        ),
        (
            Squash,
            {"short_px": 256, "side_px": 0},
            r"view.side_px is 0: .* 1 or more",
        ),
        (RandomResized, {"crop_px": 0}, r"augment.crop_px is 0: .* 1 or more"),
        (RandomResized, {"crop_px": 8, "scale": (0.5, 1.5)}, r"augment.scale is \(0.5, 1.5\)"),
        (
            RandomResized,
            {"crop_px": 8, "ratio": (2.0, 1.0)},
            r"augment.ratio is \(2.0, 1.0\): give two numbers",
        ),
        (
            RandomResized,
            {"crop_px": 8, "flip": 2.0},
            r"augment.flip is 2.0: .* 0 to 1",
        ),
    ],
)
def test_a_view_that_can_not_be_is_refused(make: type, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**settings)


@pytest.mark.parametrize(
    ("view", "name", "value", "message"),
    [
        (
            Center(short_px=256, crop_px=224),
            "crop_px",
            "abc",
            "view.crop_px is abc: .*whole number",
        ),
        (
            Center(short_px=256, crop_px=224),
            "short_px",
            None,
            "view.short_px is None: .*whole number",
        ),
        (
            Center(short_px=256, crop_px=224),
            "crop_px",
            1.5,
            "view.crop_px is 1.5: .*whole number",
        ),
        (
            Squash(short_px=256, side_px=224),
            "side_px",
            "abc",
            "view.side_px is abc: .*whole number",
        ),
        (
            RandomCrop(short_px=8, crop_px=8),
            "crop_px",
            True,
            "view.crop_px is True: .*whole number",
        ),
        (RandomResized(crop_px=8), "crop_px", "abc", "augment.crop_px is abc: .*whole number"),
        (RandomResized(crop_px=8), "scale", 0.5, "augment.scale is 0.5: give a list"),
        (
            RandomResized(crop_px=8),
            "ratio",
            ["a", 1],
            r"augment.ratio is \['a', 1\]: .*numbers above 0",
        ),
        (RandomResized(crop_px=8), "flip", "abc", "augment.flip is abc: .*number"),
    ],
)
def test_what_is_no_number_is_refused_by_name(
    view: View, name: str, value: object, message: str
) -> None:
    object.__setattr__(view, name, value)  # the type checker of tests would be first
    with pytest.raises(ValueError, match=message):
        view.__post_init__()  # type: ignore[attr-defined]


def test_words_for_a_protocol() -> None:
    assert str(Center(short_px=256, crop_px=224)) == "center view 256/224 px"
    assert (
        str(Squash(short_px=256, side_px=224))
        == "whole image at short side 256 px squashed to 224 x 224 px"
    )
    resized = "random resized crops of 224 px (area 0.08..1, aspect 0.75..1.33), flip 0.5"
    assert str(RandomResized(crop_px=224)) == resized
    assert (
        str(RandomCrop(short_px=256, crop_px=224))
        == "random crops of 224 px from the central 256 px, flip 0.5"
    )


@pytest.mark.parametrize("value", [None, "abc", {"short_px": 256}, 224])
def test_what_is_no_view_is_told(value: object) -> None:
    check_view("eval.linear.augment", RandomCrop(short_px=8, crop_px=8))
    with pytest.raises(
        UsageError, match=f"^eval.linear.augment is {re.escape(str(value))}: an evaluation sees"
    ):
        check_view("eval.linear.augment", value)
