import dataclasses
from typing import Any

import jaxtyping
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from relloc.geometry import PatchGrid
from relloc.patches.aperture import COVER_PX, Aperture
from relloc.patches.chroma_blur import ChromaBlur
from relloc.patches.color import Drop, Gray, Keep
from relloc.patches.cut import cut
from relloc.patches.normalize import ByDataset, PerPatch
from relloc.patches.pipeline import PatchPipeline
from relloc.patches.rotation import QuarterTurns
from relloc.patches.sample import sample_corners

GRID = PatchGrid(patch_px=8, gap_px=3, jitter_px=(0, 3), resize=None)  # spans 33
IMAGES = torch.randint(
    256, (6, 3, 33, 33), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


# What may be random of patches beside their jitter and colors
CHANGES: list[dict[str, Any]] = [
    {},
    {"scale": (0.8, 1.1)},
    {"chroma_blur": ChromaBlur(side_px=3)},
    {"scale": (0.8, 1.1), "aperture": Aperture(low=0.5, high=1, whole=2)},
    {"aperture": Aperture(low=0.5, high=1, whole=2), "rotation": QuarterTurns()},
]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pipeline_of(
    gap_px: int = 3, scale: tuple[float, float] | None = None, **more: Any
) -> PatchPipeline:
    grid = dataclasses.replace(GRID, gap_px=gap_px, scale=scale)
    return PatchPipeline(grid=grid, color=Drop(noise="gaussian"), normalize=ByDataset(), **more)


def test_patches_are_cut_treated_and_normalized_in_this_order() -> None:
    treatment, normalize = Gray(p=1, weights="luma"), PerPatch()
    actual = PatchPipeline(grid=GRID, color=treatment, normalize=normalize)(IMAGES, seeded(1))
    patches = cut(IMAGES, sample_corners(GRID, 6, seeded(1)), 8).float()
    assert actual.shape == (6, 9, 3, 8, 8)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(
        actual, normalize(treatment(patches, *treatment.draw(6, 9, 8, seeded(0))))
    )


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: " ".join(changes) or "none")
def test_the_generator_decides_everything(changes: dict[str, Any]) -> None:
    pipeline = pipeline_of(**changes)
    side = pipeline.grid.span_px
    images = torch.randint(256, (6, 3, side, side), dtype=torch.uint8, generator=seeded(0))
    first, again, other = (pipeline(images, seeded(seed)) for seed in (2, 2, 3))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_chroma_is_blurred_before_patches_are_cut_and_the_aperture_comes_after_colors() -> None:
    blur, aperture = ChromaBlur(side_px=5), Aperture(low=0.5, high=0.5, whole=0)
    color = Gray(p=1, weights="mean")
    untouched = PatchPipeline(grid=GRID, color=color, normalize=lambda pixels: pixels)
    pipeline = dataclasses.replace(untouched, chroma_blur=blur, aperture=aperture)
    corners, becomes_gray, windows = pipeline.draw(6, seeded(1))
    patches = pipeline.make(IMAGES, corners, becomes_gray, windows)
    cover = torch.tensor(COVER_PX).view(3, 1, 1)
    is_covered = (patches == cover).all(dim=2)
    # The window of half the side shows a quarter, in gray, and the cover keeps its color.
    assert (is_covered.sum(dim=(2, 3)) == 48).all()
    gray = color(cut(blur(IMAGES.float()), corners, 8), becomes_gray)
    visible = ~is_covered.unsqueeze(2).expand_as(patches)
    torch.testing.assert_close(patches[visible], gray[visible])


def test_the_text_of_a_fingerprint_tells_what_else_is_done() -> None:
    text = repr(pipeline_of())
    blurred = pipeline_of(chroma_blur=ChromaBlur(side_px=3))
    assert text.startswith("PatchPipeline(grid=PatchGrid(")
    assert text.endswith("normalize=ByDataset())")
    assert repr(blurred) == f"{text[:-1]}, chroma_blur=ChromaBlur(side_px=3))"


def test_scaled_patches_show_the_middle_of_their_cells() -> None:
    grid = dataclasses.replace(GRID, jitter_px=0, scale=(8 / 12, 1))
    untouched = PatchPipeline(grid=grid, color=Keep(), normalize=lambda pixels: pixels)
    assert grid.span_px == 3 * 12 + 2 * 3
    images = torch.randint(256, (6, 3, 42, 42), dtype=torch.uint8, generator=seeded(0))
    corners, scales = untouched.draw(6, seeded(0))
    patches = untouched.make(images, corners, torch.ones_like(scales))
    torch.testing.assert_close(patches, cut(images, corners + 2, 8).float())


@pytest.mark.parametrize("side", [32, 34])
def test_images_of_another_size_than_the_span_are_refused(side: int) -> None:
    pipeline = PatchPipeline(grid=GRID, color=Keep(), normalize=ByDataset())
    images = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    drawn = pipeline.draw(2, seeded(0))
    for make in (pipeline.make, pipeline.compiled(lambda function: function)):
        with pytest.raises(ValueError, match=rf"\b{side} px.*\b33 px"):
            make(images, *drawn)


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: " ".join(changes) or "none")
def test_compiled_patches_are_those_of_make_and_one_graph_serves_two_gaps(
    changes: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Checks of shapes, which only tests make, can't be compiled.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    counter = CompileCounter()
    drawn_images = torch.Generator().manual_seed(0)
    torch.compiler.reset()
    for gap_px in (3, 5):
        pipeline = pipeline_of(gap_px, **changes)
        shape = (6, 3, pipeline.grid.span_px, pipeline.grid.span_px)
        images = torch.randint(256, shape, dtype=torch.uint8, generator=drawn_images)
        drawn = pipeline.draw(len(images), seeded(4))
        make = pipeline.compiled(lambda function: torch.compile(function, backend=counter))
        torch.testing.assert_close(make(images, *drawn), pipeline.make(images, *drawn))
    assert counter.frame_count == 1
