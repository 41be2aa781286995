import math
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torchvision.transforms import functional as F

from relloc.geometry import (
    CELLS,
    CENTER,
    CHANCE_PERCENT,
    NEIGHBORS,
    OFFSETS,
    ROW_MAJOR_FROM_MMSELFSUP_1X,
    Area,
    PatchGrid,
    Resize,
    ShortSide,
    Square,
    opposite,
)

CONF = Path(__file__).parents[1] / "conf" / "grid"
LABELS = st.integers(0, 7)
SIDES = st.integers(1, 3000)
UNIFORMS = st.floats(0, 1, exclude_max=True)
JITTERS = st.one_of(
    st.integers(0, 30),
    st.tuples(st.integers(-30, 30), st.integers(0, 60)).map(
        lambda pair: (pair[0], pair[0] + pair[1])
    ),
)


def shipped(name: str) -> PatchGrid:
    return hydra.utils.instantiate(OmegaConf.load(CONF / f"{name}.yaml"), _convert_="all")


def test_the_eight_offsets_go_row_by_row_around_the_center() -> None:
    assert OFFSETS == ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
    assert CHANCE_PERCENT == 12.5


def test_the_offset_of_a_label_leads_from_the_center_cell_to_the_neighbor() -> None:
    grid = PatchGrid(patch_px=10, gap_px=3, jitter_px=2, resize=None)
    center = grid.lowest_corner(CENTER)
    for cell, (rows, columns) in zip(NEIGHBORS, OFFSETS, strict=True):
        assert grid.lowest_corner(cell) == (center[0] + 13 * rows, center[1] + 13 * columns)


@given(LABELS)
def test_opposite_points_back(label: int) -> None:
    rows, columns = OFFSETS[label]
    assert OFFSETS[opposite(label)] == (-rows, -columns)
    assert opposite(opposite(label)) == label != opposite(label)


@pytest.mark.parametrize("label", [-1, 8])
def test_only_eight_labels_have_an_opposite(label: int) -> None:
    with pytest.raises(ValueError, match=rf"label is {label}, not in 0\.\.7"):
        opposite(label)


def test_the_permutation_of_mmselfsup_1x_turns_its_columns_into_rows() -> None:
    column_by_column = ["TL", "ML", "BL", "TM", "BM", "TR", "MR", "BR"]  # protocols.md 1.4
    row_by_row = ["TL", "TM", "TR", "ML", "MR", "BL", "BM", "BR"]
    assert [column_by_column[index] for index in ROW_MAJOR_FROM_MMSELFSUP_1X] == row_by_row
    offsets = sorted(OFFSETS, key=lambda offset: offset[::-1])
    assert tuple(offsets[index] for index in ROW_MAJOR_FROM_MMSELFSUP_1X) == OFFSETS


@pytest.mark.parametrize("name", ["mmselfsup", "google2019"])
def test_mmselfsup_cuts_64_px_at_random_from_nine_cells_of_85_px(name: str) -> None:
    grid = shipped(name)
    assert (grid.patch_px, grid.pitch_px, grid.span_px) == (64, 85, 255)
    for cell in range(CELLS):
        lowest = grid.lowest_corner(cell)
        assert lowest == (cell // 3 * 85, cell % 3 * 85)  # the cell's own corner
        assert grid.jitter_width + grid.patch_px == 85  # and its far one


def test_mmselfsup_keeps_the_aspect_ratio_and_google_squashes() -> None:
    assert shipped("mmselfsup").resized(300, 600, 0) == (292, 584)
    assert shipped("google2019").resized(300, 600, 0) == (292, 292)


def test_the_papers_grid() -> None:
    grid = shipped("doersch2015")
    assert (grid.patch_px, grid.gap_px, grid.jitter_range) == (96, 48, (-7, 7))
    assert grid.span_px == 3 * 96 + 2 * 48 + 2 * 7 == 398
    assert grid.resize == Area(low_px2=150_000, high_px2=450_000)


@st.composite
def valid(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of a grid; beartype draws lots in constructors, which hypothesis forbids here."""
    patch_px, gap_px, jitter_px = draw(st.integers(1, 100)), draw(st.integers(0, 50)), draw(JITTERS)
    jitter_width = 2 * jitter_px if isinstance(jitter_px, int) else jitter_px[1] - jitter_px[0]
    px = 3 * patch_px + 2 * gap_px + jitter_width + draw(st.integers(0, 100))
    low = draw(st.integers(1, 500_000))
    area = Area(low_px2=low, high_px2=draw(st.integers(low, 600_000)))
    resize = draw(st.sampled_from([None, ShortSide(px=px), Square(px=px), area]))
    return {"patch_px": patch_px, "gap_px": gap_px, "jitter_px": jitter_px, "resize": resize}


@given(valid())
def test_patches_stay_in_the_span_and_reach_both_its_ends(numbers: dict[str, Any]) -> None:
    grid = PatchGrid(**numbers)
    low, high = grid.jitter_range
    corners = [grid.lowest_corner(cell) for cell in range(CELLS)]
    for axis in (0, 1):
        assert min(corner[axis] for corner in corners) == 0
        assert (
            max(corner[axis] for corner in corners) + (high - low) + grid.patch_px == grid.span_px
        )


@given(valid(), SIDES, SIDES, UNIFORMS)
def test_the_span_fits_in_any_resized_image(
    numbers: dict[str, Any], height: int, width: int, u: float
) -> None:
    grid = PatchGrid(**numbers)
    if grid.resize is None:
        height, width = height + grid.span_px, width + grid.span_px
    resized = grid.resized(height, width, u)
    assert min(resized) >= grid.span_px
    if grid.resize is None:
        assert resized == (height, width)
    if isinstance(grid.resize, Square | ShortSide):
        assert resized == grid.resize.size(height, width, u)  # it fits: nothing more is enlarged


@pytest.mark.parametrize("resize", [ShortSide, Square])
def test_a_grid_larger_than_its_images_does_not_exist(
    resize: type[ShortSide] | type[Square],
) -> None:
    sizes = {"patch_px": 64, "gap_px": 21, "jitter_px": [0, 21]}
    assert PatchGrid(**sizes, resize=resize(px=255)).span_px == 255
    with pytest.raises(
        ValueError,
        match=r"\b255 px \(3 x 64 px.* 2 x 21 px.* 21 px of jitter.*\b254 px.*\b255\b",
    ):
        PatchGrid(**sizes, resize=resize(px=254))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"patch_px": 0}, "grid.patch_px is 0"),
        ({"patch_px": -4}, "grid.patch_px is -4"),
        ({"gap_px": -1}, "grid.gap_px is -1"),
        ({"jitter_px": -2}, "grid.jitter_px is -2"),
        ({"jitter_px": [5, 3]}, "grid.jitter_px runs from 5 to 3"),
        ({"jitter_px": [1, 2, 3]}, r"grid.jitter_px is \[1, 2, 3\]"),
        ({"jitter_px": [1]}, r"grid.jitter_px is \[1\]"),
        ({"scale": [1.2, 0.8]}, r"grid.scale is \[1.2, 0.8\]"),
        ({"scale": [0.8, 1.0, 1.2]}, r"grid.scale is \[0.8, 1.0, 1.2\]"),
        ({"scale": [0, 1.2]}, r"grid.scale is \[0, 1.2\]"),
        ({"yoked_scale": True}, "grid.yoked_scale=true"),
    ],
)
def test_impossible_numbers_are_named(wrong: dict[str, object], message: str) -> None:
    right = {"patch_px": 8, "gap_px": 2, "jitter_px": 1, "resize": None}
    with pytest.raises(ValueError, match=message):
        PatchGrid(**right | wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [("patch_px", 2.5), ("gap_px", 0.5), ("jitter_px", 1.5), ("jitter_px", [0, 1.5])],
)
def test_fractions_of_a_pixel_are_refused(name: str, value: object) -> None:
    right = {"patch_px": 8, "gap_px": 2, "jitter_px": 1, "resize": None}
    # Types are checked in tests, and refuse it first; without them PatchGrid has to.
    with pytest.raises((ValueError, TypeError), match=name.removesuffix("_px")):
        PatchGrid(**right | {name: value})  # type: ignore[arg-type]


def test_a_cell_is_as_large_as_the_most_that_a_patch_may_show() -> None:
    # Mundhenk et al. store patches of 110 px, resize them to 96 to 128 and show 96 of these.
    scale = (96 / 110, 128 / 110)
    grid = PatchGrid(patch_px=96, gap_px=5, jitter_px=0, resize=None, scale=scale)
    assert (grid.cell_px, grid.span_px) == (110, 340)


@pytest.mark.parametrize("px", [0, -5])
def test_images_cannot_be_resized_to_nothing(px: int) -> None:
    for resize in (ShortSide, Square):
        with pytest.raises(ValueError, match=rf"grid.resize.px is {px}"):
            resize(px=px)


@pytest.mark.parametrize(("low", "high"), [(0, 10), (-5, 10), (20, 10)])
def test_an_area_range_is_above_zero_and_not_reversed(low: int, high: int) -> None:
    with pytest.raises(ValueError, match=rf"{low}\.\.{high} px2"):
        Area(low_px2=low, high_px2=high)


@given(SIDES, SIDES, st.integers(1, 600))
def test_short_side_is_torchvisions_resize(height: int, width: int, px: int) -> None:
    image = torch.empty(1, height, width, device="meta")
    assert ShortSide(px=px).size(height, width, 0) == tuple(
        F.resize(image, [px], antialias=True).shape[1:]
    )


@given(st.integers(1, 4000), st.integers(1, 4000), UNIFORMS)
def test_area_is_drawn_from_the_range_and_keeps_the_aspect_ratio(
    height: int, width: int, u: float
) -> None:
    new_height, new_width = Area(low_px2=150_000, high_px2=450_000).size(height, width, u)
    area = 150_000 + u * 300_000
    half_a_pixel = 0.5 * (new_height + new_width) + 0.25
    assert abs(new_height * new_width - area) <= half_a_pixel
    assert abs(new_height - math.sqrt(area * height / width)) <= 0.5001
    assert abs(new_width - math.sqrt(area * width / height)) <= 0.5001


def test_area_reaches_both_ends_of_its_range() -> None:
    resize = Area(low_px2=150_000, high_px2=450_000)
    assert resize.size(100, 150, 0) == (316, 474)  # 149,784 px2
    assert resize.size(100, 150, 1 - 1e-9) == (548, 822)  # 450,456 px2


def test_an_area_too_narrow_for_the_grid_is_enlarged_until_it_fits_and_keeps_its_aspect_ratio() -> (
    None
):
    grid = shipped("doersch2015")
    assert grid.resized(480, 640, 0) == (398, 532)  # 150,000 px2 would be 335 x 447
    assert grid.resized(480, 640, 0.9) == grid.resize.size(480, 640, 0.9)  # type: ignore[union-attr]
    height, width = grid.resized(10, 1000, 0.5)
    assert height == 398
    assert width / height == pytest.approx(100, rel=0.02)


def test_rounding_never_leaves_an_enlarged_image_a_pixel_short() -> None:
    for side in range(1, 398):
        grid = PatchGrid(
            patch_px=96, gap_px=48, jitter_px=7, resize=Area(low_px2=side**2, high_px2=side**2)
        )
        assert grid.resized(1000, 1000, 0) in ((398, 398), (399, 399))


def test_without_resize_an_image_keeps_its_size_and_must_hold_the_grid() -> None:
    grid = PatchGrid(patch_px=64, gap_px=21, jitter_px=(0, 21), resize=None)
    assert grid.resized(255, 700, 0.3) == (255, 700)
    with pytest.raises(ValueError, match=r"\b300x254 px.*\b255 px"):
        grid.resized(254, 300, 0.3)
    with pytest.raises(ValueError, match=r"\b254x300 px.*\b255 px"):
        grid.resized(300, 254, 0.3)


def test_no_resized_image_has_a_side_below_the_shortest_that_its_resize_gives() -> None:
    resizes: list[Resize] = [ShortSide(px=30), Square(px=30), Area(low_px2=50, high_px2=60)]
    for resize in resizes:
        for height, width in [(1, 1000), (1000, 1), (7, 7)]:
            assert min(resize.size(height, width, 0.5)) >= resize.shortest()


def test_a_grid_with_lists_for_settings_is_hashable() -> None:
    settings = {"patch_px": 8, "gap_px": 2, "resize": None}
    one, same = (PatchGrid(jitter_px=[0, 1], scale=[1.0, 1.5], **settings) for _ in range(2))
    assert len({one, same, PatchGrid(jitter_px=1, **settings)}) == 2


def test_a_grid_of_four_rows_has_sixteen_cells() -> None:
    grid = PatchGrid(patch_px=10, gap_px=3, jitter_px=2, resize=None, rows=4)
    assert grid.cells == 16
    assert grid.span_px == 4 * 10 + 3 * 3 + 4
    assert [grid.lowest_corner(cell) for cell in (0, 3, 4, 15)] == [
        (0, 0),
        (0, 39),
        (13, 0),
        (39, 39),
    ]
