import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from relloc.geometry import PatchGrid
from relloc.patches.cut import cut, cut_patches, rescale

IMAGES = torch.randint(
    256, (3, 3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.0, 1.3, 2.5])
def test_scaled_patches_are_pillows_up_to_its_rounding(factor: float) -> None:
    patch_px = 12
    grid = PatchGrid(patch_px=patch_px, gap_px=0, jitter_px=0, resize=None, scale=(factor, factor))
    cell_px = grid.cell_px
    pixels = torch.randint(256, (3, 80, 90), dtype=torch.uint8, generator=seeded(1))
    corner = (7, 11)
    corners = torch.tensor([[corner]])
    scales = torch.tensor([[factor]])
    patch = cut_patches(pixels.unsqueeze(0), grid, corners, scales)[0, 0]

    cell = pixels[:, 7 : 7 + cell_px, 11 : 11 + cell_px]
    image = Image.fromarray(cell.permute(1, 2, 0).numpy())
    margin = (cell_px - patch_px / factor) / 2
    box = (margin, margin, cell_px - margin, cell_px - margin)
    expected = image.resize((patch_px, patch_px), Image.Resampling.BILINEAR, box=box)
    difference = patch - torch.from_numpy(np.array(expected)).permute(2, 0, 1)
    # Pillow rounds to whole gray levels after each side.
    assert difference.abs().max() <= 1.01
    assert difference.abs().mean() < 0.45


def test_scaling_by_one_keeps_each_pixel_and_autocast_its_precision() -> None:
    cells = torch.randint(256, (2, 3, 3, 9, 9), generator=seeded(2)).float()
    same = rescale(cells, torch.ones(2, 3), 9)
    torch.testing.assert_close(same, cells)
    scales = torch.full((2, 3), 1.7)
    with torch.autocast("cpu", torch.bfloat16):
        in_autocast = rescale(cells, scales, 9)
    assert torch.equal(in_autocast, rescale(cells, scales, 9))
