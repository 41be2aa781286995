"""Nothing but the content of an image may tell where a patch lies: white noise has no content.

A ridge classifier answers from what could leak: correlations between the two patches at every
shift (shared pixels), correlations between the channels of a patch at small shifts (chromatic
aberration), and the brightness and contrast of each channel. Two controls show that it sees leaks.
"""

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from relloc.geometry import CENTER, NEIGHBORS, OFFSETS, PatchGrid
from relloc.patches.color import Drop, Gray, Keep, Project
from relloc.patches.cut import cut
from relloc.patches.normalize import ByDataset, PerPatch
from relloc.patches.pipeline import PatchPipeline

N_TRAIN, N_TEST = 3000, 1500
PATCH_PX = 12
CELLS_OF_16 = PatchGrid(
    patch_px=PATCH_PX, gap_px=4, jitter_px=(0, 4), resize=None
)  # mmselfsup's, spans 48
HALF_A_PATCH_APART = PatchGrid(
    patch_px=PATCH_PX, gap_px=6, jitter_px=1, resize=None
)  # the paper's, spans 50


def noise(n: int, side: int, generator: torch.Generator) -> Tensor:
    return torch.randint(256, (n, 3, side, side), dtype=torch.uint8, generator=generator)


def correlations(first: Tensor, second: Tensor) -> Tensor:
    """Sums of products over (..., p, p) at every shift: (..., 2p, 2p), shift 0 in the middle."""
    size = (2 * PATCH_PX, 2 * PATCH_PX)
    product = torch.fft.rfft2(first, s=size) * torch.fft.rfft2(second, s=size).conj()
    return torch.fft.fftshift(torch.fft.irfft2(product, s=size), dim=(-2, -1))


def clues(neighbor: Tensor, center: Tensor) -> Tensor:
    between = correlations(neighbor, center).sum(dim=1).flatten(1)
    near = slice(PATCH_PX - 3, PATCH_PX + 4)
    within = [
        correlations(patch, patch.roll(1, dims=1))[..., near, near].flatten(1)
        for patch in (neighbor, center)
    ]
    levels = [
        moment
        for patch in (neighbor, center)
        for moment in (patch.mean(dim=(2, 3)), patch.std(dim=(2, 3)))
    ]
    products = torch.einsum("bi, bj -> bij", levels[0], levels[2]).flatten(1)
    return torch.cat([between, *within, *levels, products], dim=1)


def right_answers(patches: Tensor, generator: torch.Generator) -> int:
    """Of N_TEST, after training on N_TRAIN: one pair an image, so that answers are independent."""
    labels = torch.randint(8, (len(patches),), generator=generator)
    image = torch.arange(len(patches))
    found = clues(patches[image, torch.tensor(NEIGHBORS)[labels]], patches[:, CENTER])
    train, test = found.double().split([N_TRAIN, N_TEST])
    mean, std = train.mean(dim=0), train.std(dim=0).clamp(min=1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    wanted = F.one_hot(labels[:N_TRAIN], 8).double() - 1 / 8
    gram = train.T @ train + 300 * torch.eye(train.shape[1], dtype=train.dtype)
    answers = (test @ torch.linalg.solve(gram, train.T @ wanted)).argmax(dim=1)
    return int((answers == labels[N_TRAIN:]).sum())


def at_chance(right: int) -> bool:
    low, high = stats.binom.interval(0.999, N_TEST, 1 / 8)
    return low <= right <= high


@pytest.mark.parametrize(
    ("grid", "color", "normalize"),
    [
        pytest.param(CELLS_OF_16, Keep(), ByDataset(), id="mmselfsup-none"),
        pytest.param(CELLS_OF_16, Gray(p=0.66, weights="luma"), PerPatch(), id="mmselfsup-gray"),
        pytest.param(HALF_A_PATCH_APART, Keep(), PerPatch(), id="doersch2015-none"),
        pytest.param(
            HALF_A_PATCH_APART, Drop(noise="gaussian"), ByDataset(), id="doersch2015-drop"
        ),
        pytest.param(HALF_A_PATCH_APART, Project(), ByDataset(), id="doersch2015-projection"),
    ],
)
def test_white_noise_stays_at_chance(grid: PatchGrid, color: Keep, normalize: ByDataset) -> None:
    generator = torch.Generator().manual_seed(0)
    images = noise(N_TRAIN + N_TEST, grid.span_px, generator)
    patches = PatchPipeline(grid=grid, color=color, normalize=normalize)(images, generator)
    assert at_chance(right_answers(patches, generator))


def test_patches_that_share_a_line_of_pixels_are_found_out() -> None:
    generator = torch.Generator().manual_seed(1)
    pitch = PATCH_PX - 1
    corners = torch.tensor([[cell // 3 * pitch, cell % 3 * pitch] for cell in range(9)])
    images = noise(N_TRAIN + N_TEST, 3 * pitch + 1, generator)
    patches = cut(images, corners.expand(len(images), 9, 2), PATCH_PX).float()
    assert right_answers(ByDataset()(patches), generator) > 0.4 * N_TEST


def through_a_lens(n: int, generator: torch.Generator) -> Tensor:
    """White noise whose red comes from 2 px further out than its green, but in the center cell."""
    green = noise(n, 48 + 4, generator)[:, 0]
    red = green.clone()
    for row, column in OFFSETS:
        top, left = 16 * (1 + row) + 2, 16 * (1 + column) + 2
        shifted = green[:, top + 2 * row :, left + 2 * column :][:, :16, :16]
        red[:, top : top + 16, left : left + 16] = shifted
    blue = noise(n, 48 + 4, generator)[:, 0]
    return torch.stack([red, green, blue], dim=1)[:, :, 2:-2, 2:-2].contiguous()


def test_a_lens_gives_the_answer_away_unless_colors_are_dropped() -> None:
    generator = torch.Generator().manual_seed(2)
    images = through_a_lens(N_TRAIN + N_TEST, generator)
    kept, dropped = (
        PatchPipeline(grid=CELLS_OF_16, color=color, normalize=ByDataset())(images, generator)
        for color in (Keep(), Drop(noise="gaussian"))
    )
    assert right_answers(kept, generator) > 0.9 * N_TEST
    assert at_chance(right_answers(dropped, generator))
