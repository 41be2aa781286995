import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from relloc.patches.cut import cut

IMAGES = torch.randint(
    256, (3, 3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


@given(st.data(), st.integers(1, 20), st.integers(1, 4))
def test_cut_is_slicing(data: st.DataObject, patch_px: int, n: int) -> None:
    corner = st.tuples(st.integers(0, 20 - patch_px), st.integers(0, 30 - patch_px))
    corners = data.draw(st.lists(st.lists(corner, min_size=n, max_size=n), min_size=3, max_size=3))
    patches = cut(IMAGES, torch.tensor(corners), patch_px)
    assert patches.shape == (3, n, 3, patch_px, patch_px)
    for image, of_image, actual in zip(IMAGES, corners, patches, strict=True):
        for (top, left), patch in zip(of_image, actual, strict=True):
            assert torch.equal(patch, image[:, top : top + patch_px, left : left + patch_px])


@pytest.mark.parametrize("corner", [(13, 0), (0, 23), (-1, 0), (0, -1), (-14, 3)])
def test_a_patch_beyond_the_image_is_refused(corner: tuple[int, int]) -> None:
    corners = torch.zeros(3, 2, 2, dtype=torch.int64)
    assert cut(IMAGES, corners + torch.tensor([12, 22]), 8).shape == (
        3,
        2,
        3,
        8,
        8,
    )  # the last that fits
    corners[1, 1] = torch.tensor(corner)
    with pytest.raises(IndexError):
        cut(IMAGES, corners, 8)


def test_patches_are_copies() -> None:
    images = IMAGES.clone()
    cut(images, torch.zeros(3, 1, 2, dtype=torch.int64), 8).zero_()
    assert torch.equal(images, IMAGES)
