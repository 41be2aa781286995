import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats

from relloc.geometry import CELLS, PatchGrid
from relloc.patches.sample import sample_corners, sample_places

MMSELFSUP = PatchGrid(patch_px=64, gap_px=21, jitter_px=(0, 21), resize=None)
N = 10_000


def moves_of(grid: PatchGrid, n_images: int, seed: int) -> torch.Tensor:
    """Displacement of each patch from where it lies without jitter, on (image, cell, axis)."""
    low, _ = grid.jitter_range
    unmoved = torch.tensor(
        [[cell // 3 * grid.pitch_px - low, cell % 3 * grid.pitch_px - low] for cell in range(CELLS)]
    )
    return sample_corners(grid, n_images, torch.Generator().manual_seed(seed)) - unmoved


@pytest.mark.parametrize(
    ("jitter", "low", "high"), [((0, 21), 0, 21), (7, -7, 7), ((-3, 5), -3, 5), (0, 0, 0)]
)
def test_every_patch_reaches_both_ends_of_the_jitter_and_goes_no_further(
    jitter: int | tuple[int, int], low: int, high: int
) -> None:
    moves = moves_of(PatchGrid(patch_px=10, gap_px=4, jitter_px=jitter, resize=None), 1000, seed=0)
    assert (moves.amin(dim=0) == low).all()
    assert (moves.amax(dim=0) == high).all()


def test_patches_lie_in_the_span() -> None:
    corners = sample_corners(MMSELFSUP, N, torch.Generator().manual_seed(1))
    assert corners.shape == (N, 9, 2)
    assert corners.min() == 0
    assert corners.max() + 64 == 255


def test_displacements_are_uniform_for_every_cell_and_axis() -> None:
    moves = moves_of(MMSELFSUP, N, seed=2).reshape(N, 18).numpy()
    p_values = [stats.chisquare(np.bincount(column, minlength=22)).pvalue for column in moves.T]
    assert min(p_values) > 0.001 / 18


def test_patches_of_an_image_move_independently_of_each_other_and_on_both_axes() -> None:
    moves = moves_of(MMSELFSUP, N, seed=3).reshape(N, 18).numpy()
    together = np.corrcoef(moves.T) - np.eye(18)
    assert np.abs(together).max() < 4.5 / np.sqrt(N)
    apart = moves[1:].ravel(), moves[:-1].ravel()  # one image and the next
    assert abs(np.corrcoef(*apart)[0, 1]) < 4.5 / np.sqrt(18 * N)


def test_a_seed_decides_the_corners() -> None:
    first, again, other = (
        sample_corners(MMSELFSUP, 5, torch.Generator().manual_seed(seed)) for seed in (4, 4, 5)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_generator_that_goes_on_gives_new_corners_and_leaves_the_global_one_alone() -> None:
    generator, before = torch.Generator().manual_seed(4), torch.get_rng_state()
    assert not torch.equal(
        sample_corners(MMSELFSUP, 5, generator), sample_corners(MMSELFSUP, 5, generator)
    )
    assert torch.equal(torch.get_rng_state(), before)


def test_yoked_patches_move_together_over_the_whole_range() -> None:
    grid = PatchGrid(patch_px=10, gap_px=4, jitter_px=(-3, 5), resize=None, yoked_jitter=True)
    moves = moves_of(grid, 1000, seed=6)
    assert (moves == moves[:, :1]).all()
    assert (moves.amin(dim=0) == -3).all()
    assert (moves.amax(dim=0) == 5).all()
    rows, columns = moves[:, 0].double().T
    assert abs(np.corrcoef(rows, columns)[0, 1]) < 4.5 / np.sqrt(1000)


@pytest.mark.parametrize("yoked", [False, True])
def test_scales_are_uniform_over_their_range_and_yoked_those_of_an_image_are_equal(
    yoked: bool,
) -> None:
    jittered = PatchGrid(patch_px=10, gap_px=4, jitter_px=2, resize=None)
    grid = dataclasses.replace(jittered, scale=(0.8, 1.25), yoked_scale=yoked)
    corners, scales = sample_places(grid, 2000, torch.Generator().manual_seed(7))
    assert scales.shape == (2000, 9)
    assert (scales == scales[:, :1]).all() == yoked
    uniform = stats.uniform(loc=0.8, scale=0.45)
    assert stats.kstest(scales[:, 4].numpy(), uniform.cdf).pvalue > 0.001
    # A patch of 10 px shows up to 12.5, so that cells are 13 px apart from their gap.
    assert (grid.cell_px, grid.pitch_px, grid.span_px) == (13, 17, 51)
    assert corners.amax() + 13 == 51
    [alone] = sample_places(jittered, 2000, torch.Generator().manual_seed(7))
    pitches = torch.tensor([[cell // 3, cell % 3] for cell in range(CELLS)]) * 3
    assert torch.equal(corners, alone + pitches)  # jitter is the same with and without a scale
