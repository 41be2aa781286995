from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from relloc.data.folder import FolderImages
from relloc.data.photos import read_photo
from relloc.data.views import CenterViews

SIZES = [(300, 400), (400, 300), (256, 256), (500, 333), (333, 501), (100, 120), (375, 500), (40, 2000), (2000, 41)]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> FolderImages:
    folder, random = tmp_path_factory.mktemp("views"), np.random.default_rng(0)
    for number, (height, width) in enumerate(SIZES):
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.ppm")
    return FolderImages(name="mine", split="val", paths=sorted(map(str, folder.iterdir())))


@pytest.mark.parametrize("view", [(256, 224), (96, 81), (64, 64)])
def test_a_view_is_torchvisions_resize_and_center_crop(images: FolderImages, view: Sequence[int]) -> None:
    short_px, crop_px = view
    oracle = transforms.Compose([transforms.Resize(short_px), transforms.CenterCrop(crop_px), transforms.PILToTensor()])
    views = CenterViews(images, short_px=short_px, crop_px=crop_px)
    assert len(views) == len(SIZES)
    for index in range(len(views)):
        sample = views[index]
        assert (sample.index, sample.unreadable) == (index, {})
        assert sample.pixels is not None
        assert sample.pixels.permute(1, 2, 0).is_contiguous()  # as decoders leave them
        expected = oracle(images.read(index))
        assert sample.pixels.shape == expected.shape == (3, crop_px, crop_px)
        difference = (sample.pixels.int() - expected.int()).abs()
        assert difference.max() <= 2  # torchvision rounds after each axis; in noise that adds up now and then
        assert (difference > 1).float().mean() < 1e-4
        assert torch.equal(views[index].pixels, sample.pixels)  # no chance in it


def test_an_unreadable_image_has_no_view_but_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "empty.jpg"
    path.touch()
    views = CenterViews(FolderImages(name="mine", split="val", paths=[str(path)]), short_px=256, crop_px=224)
    sample = views[0]
    assert (sample.index, sample.pixels, sample.unreadable) == (0, None, {str(path): "is an empty file"})


def test_a_crop_larger_than_the_short_side_is_refused(images: FolderImages) -> None:
    with pytest.raises(ValueError, match=r"view.crop_px 257 is larger than view.short_px 256"):
        CenterViews(images, short_px=256, crop_px=257)


@pytest.mark.parametrize("photo", ["chelsea", "coffee", "hubble"])
def test_on_photographs_a_view_is_torchvisions_within_one_gray_level(photo: str, tmp_path: Path) -> None:
    path = tmp_path / "a.ppm"
    image = read_photo(photo)
    image.save(path)
    oracle = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.PILToTensor()])
    views = CenterViews(FolderImages(name="mine", split="val", paths=[str(path)]), short_px=256, crop_px=224)
    assert (views[0].pixels.int() - oracle(image).int()).abs().max() <= 1  # type: ignore[union-attr]
