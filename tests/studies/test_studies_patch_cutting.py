"""What boxes hold, cut and resized on the device, beside torch's and Pillow's resizing."""

import numpy as np
import pytest
import torch
from made_patches import CPU, made_images, plain_patch
from PIL import Image

from relloc.data.folder import FolderImages
from relloc.studies.patch_cutting import _cut_together, cut_resized, flat_images


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> FolderImages:
    return made_images(tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize("patch_px", [17, 32, 96])
def test_patches_are_cut_and_resized_as_torch_and_pillow_do(
    images: FolderImages, patch_px: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Larger and smaller than the patches, of their size, not square, at the borders; two images
    boxes = [(0, 0, 90, 70), (3, 5, 99, 64), (58, 38, 90, 70), (1, 2, 18, 19), (7, 0, 9, 64)]
    numbers = np.array([0, 1, 0, 0, 1])
    pictures = [images.read(0), images.read(1)]
    flat = flat_images([np.array(each) for each in pictures], CPU)
    cut = cut_resized(flat, numbers, np.array(boxes), patch_px)
    for patch, number, box in zip(cut, numbers, boxes, strict=True):
        twin = plain_patch(pictures[number], box, patch_px)
        torch.testing.assert_close(patch, twin, atol=2e-3, rtol=0)
        # Pillow rounds to whole gray levels, after the rows and after the columns.
        resized = pictures[number].crop(box).resize((patch_px,) * 2, Image.Resampling.BILINEAR)
        by_pillow = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
        assert (patch - by_pillow).abs().max() < 1.6
    # How many boxes are resized at once, on a GPU, does not matter.
    for work_bytes in (1, 48 * 64 * 90 * 2, 2**30):
        monkeypatch.setattr("relloc.studies.patch_cutting._WORK_BYTES", work_bytes)
        together = _cut_together(flat, numbers, np.array(boxes), patch_px)
        torch.testing.assert_close(together, cut, atol=2e-3, rtol=0)


def test_boxes_of_the_size_of_patches_keep_their_pixels(images: FolderImages) -> None:
    pixels = np.array(images.read(3))
    boxes = np.array([(5, 6, 37, 38), (45, 91, 77, 123)])
    for cutting in (cut_resized, _cut_together):
        first, second = cutting(flat_images([pixels], CPU), np.array([0, 0]), boxes, 32)
        assert np.array_equal(first.permute(1, 2, 0), pixels[6:38, 5:37])
        assert np.array_equal(second.permute(1, 2, 0), pixels[91:, 45:])
