"""Tests that patches follow a curriculum by the share of the training that is done."""

import dataclasses
import itertools
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from relloc.errors import UsageError
from relloc.geometry import PatchGrid
from relloc.patches.aperture import Aperture
from relloc.patches.chroma_blur import ChromaBlur
from relloc.patches.color import Drop, Gray, Keep
from relloc.patches.curriculum import Curriculum, Mixed, TrainingPatches, check_effects
from relloc.patches.normalize import ByDataset
from relloc.patches.pipeline import PatchPipeline
from relloc.patches.rotation import QuarterTurns
from relloc.pretext.graphed import Graphed

LAST = PatchGrid(patch_px=8, gap_px=8, jitter_px=3, resize=None)
PATCHES = PatchPipeline(grid=LAST, color=Gray(p=1, weights="mean"), normalize=ByDataset())
CURRICULUM = Curriculum(
    begin=0.2, end=0.6, gap_px=2, jitter_px=(0, 1), treated=0.25, otherwise=Keep()
)
HALF_GRAY = Gray(p=0.5, weights="mean")
SHARES = (0.0, 0.2, 0.3, 0.45, 0.6, 0.99)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images_of(patches: TrainingPatches, n: int) -> torch.Tensor:
    side = patches.grid.span_px
    return torch.randint(256, (n, 3, side, side), dtype=torch.uint8, generator=seeded(0))


@pytest.mark.parametrize("share", SHARES)
def test_values_are_those_between_two_knots(share: float) -> None:
    def between(first: float, last: float) -> float:
        return float(np.interp(share, [0.2, 0.6], [first, last]))

    grid = CURRICULUM.grid_at(LAST, share)
    expected = [between(2, 8), between(0, -3), between(1, 3)]
    assert [grid.gap_px, *grid.jitter_range] == [int(np.floor(value + 0.5)) for value in expected]
    assert CURRICULUM.treated_at(share) == pytest.approx(between(0.25, 1))
    assert dataclasses.replace(grid, gap_px=8, jitter_px=3) == LAST


def test_values_that_are_not_given_stay_those_of_the_end() -> None:
    only_gap = Curriculum(begin=0, end=1, gap_px=0, jitter_px=None, treated=None, otherwise=Keep())
    assert only_gap.grid_at(LAST, 0.0) == dataclasses.replace(LAST, gap_px=0, jitter_px=(-3, 3))
    # The same random numbers as without a curriculum, and no more
    patches = TrainingPatches(patches=PATCHES, curriculum=only_gap)
    drawn = patches.draw(4, seeded(1), 0.99999)
    plain = PATCHES.draw(4, seeded(1))
    assert all(torch.equal(*pair) for pair in zip(drawn, plain, strict=True))


@pytest.mark.parametrize(("first", "last"), [((2, 0), (8, 3)), ((8, 3), (2, 0)), ((8, 0), (2, 5))])
def test_each_grid_lies_in_the_middle_of_a_crop_that_holds_them_all(
    first: tuple[int, int], last: tuple[int, int]
) -> None:
    grid = dataclasses.replace(LAST, gap_px=last[0], jitter_px=last[1])
    curriculum = dataclasses.replace(CURRICULUM, gap_px=first[0], jitter_px=first[1])
    patches = TrainingPatches(
        patches=dataclasses.replace(PATCHES, grid=grid), curriculum=curriculum
    )
    side = patches.grid.span_px
    for share in SHARES:
        corners = patches.draw(500, seeded(2), share)[0]
        before, after = corners.amin(), side - (corners.amax() + 8)
        assert before >= 0
        assert after - before in (0, 1)


def test_the_share_of_treated_images_grows_and_the_others_are_treated_otherwise() -> None:
    untouched = dataclasses.replace(PATCHES, normalize=lambda pixels: pixels)
    patches = TrainingPatches(patches=untouched, curriculum=CURRICULUM)
    images = images_of(patches, 400)
    make = patches.maker(None)
    for share in (0.0, 0.4, 0.7):
        made = make(images, *patches.draw(400, seeded(3), share))
        is_gray = (made == made[:, :, :1]).flatten(1).all(dim=1)
        wanted = CURRICULUM.treated_at(share)
        assert abs(is_gray.float().mean().item() - wanted) < 0.1


@pytest.mark.parametrize(
    "colors", list(itertools.permutations([Keep(), HALF_GRAY, Drop(noise="uniform")], 2))
)
def test_mixed_colors_are_those_of_one_treatment_or_the_other(colors: tuple[Any, Any]) -> None:
    patches = torch.rand(50, 9, 3, 4, 4, generator=seeded(4)) * 255
    treatment, other = colors
    mixed = Mixed(treatment=treatment, other=other, share=0.5)
    is_treated, *drawn = mixed.draw(50, 9, 4, seeded(5))
    made = mixed(patches, is_treated, *drawn)
    n_first = len(treatment.draw(50, 9, 4, seeded(5)))
    first, second = treatment(patches, *drawn[:n_first]), other(patches, *drawn[n_first:])
    assert 10 < is_treated.sum() < 40
    for image, treated in enumerate(is_treated):
        assert torch.equal(made[image], (first if treated else second)[image])


def test_one_compiled_graph_serves_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    # Checks of shapes, which only tests make, can't be compiled.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    patches = TrainingPatches(
        patches=dataclasses.replace(PATCHES, color=Drop(noise="gaussian")), curriculum=CURRICULUM
    )
    images = images_of(patches, 6)
    counter = CompileCounter()
    torch.compiler.reset()
    fast = patches.maker(lambda function: torch.compile(function, backend=counter))
    shapes = set()
    for share in SHARES:
        drawn = patches.draw(6, seeded(6), share)
        shapes.add(tuple((tensor.shape, tensor.dtype) for tensor in drawn))
        torch.testing.assert_close(fast(images, *drawn), patches.maker(None)(images, *drawn))
    assert counter.frame_count == 1
    assert len(shapes) == 1  # as a CUDA graph needs it


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"begin": 0.6}, "curriculum.begin is 0.6"),
        ({"end": 1.5}, "curriculum.end is 1.5"),
        ({"gap_px": -1}, "curriculum.gap_px is -1"),
        ({"jitter_px": [3, 1]}, "curriculum.jitter_px runs from 3 to 1"),
        ({"treated": 1.5}, "curriculum.treated is 1.5"),
        ({"gap_px": None, "jitter_px": None, "treated": None}, "nothing changes"),
    ],
)
def test_wrong_values_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(CURRICULUM, **wrong)


@pytest.mark.gpu
def test_one_recorded_graph_makes_the_patches_of_all_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    everything = PatchPipeline(
        grid=dataclasses.replace(LAST, scale=(0.9, 1.2)),
        color=Drop(noise="gaussian"),
        normalize=ByDataset(),
        chroma_blur=ChromaBlur(side_px=5),
        aperture=Aperture(low=0.5, high=1, whole=3),
        rotation=QuarterTurns(),
    )
    patches = TrainingPatches(patches=everything, curriculum=CURRICULUM)
    images = images_of(patches, 6).cuda()
    torch.compiler.reset()
    recorded = Graphed(patches.maker(torch.compile))
    # The first calls are made plainly, those after them replay the graph.
    for share in SHARES:
        drawn = patches.draw(6, torch.Generator("cuda").manual_seed(7), share)
        made = recorded(images, *drawn).cpu()
        expected = patches.maker(None)(images.cpu(), *(tensor.cpu() for tensor in drawn))
        torch.testing.assert_close(made, expected, rtol=0, atol=0.02)


def without_change(**values: Any) -> Curriculum:
    nothing = {"gap_px": None, "jitter_px": None, "treated": None, **values}
    return dataclasses.replace(CURRICULUM, **nothing)


def test_settings_without_effect_are_refused_by_name() -> None:
    check_effects(TrainingPatches(patches=PATCHES, curriculum=CURRICULUM))
    check_effects(TrainingPatches(patches=PATCHES, curriculum=without_change(treated=0)))
    check_effects(TrainingPatches(patches=PATCHES, curriculum=without_change(jitter_px=0)))
    all_whole = Aperture(low=0.5, high=1, whole=9)
    parts = {"chroma_blur": ChromaBlur(side_px=1), "aperture": all_whole}
    for name, part in parts.items():
        changed = dataclasses.replace(PATCHES, **{name: part})
        with pytest.raises(UsageError, match=name):
            check_effects(TrainingPatches(patches=changed))
    plain = dataclasses.replace(PATCHES, color=Keep())
    for patches, curriculum, setting in (
        (PATCHES, without_change(treated=1), "treated=1"),
        (PATCHES, without_change(gap_px=8, jitter_px=[-3, 3]), "gap_px=8"),
        (PATCHES, without_change(gap_px=0, otherwise=HALF_GRAY), "otherwise"),
        (plain, without_change(treated=0), "treated=0"),
    ):
        with pytest.raises(UsageError, match=setting):
            check_effects(TrainingPatches(patches=patches, curriculum=curriculum))
