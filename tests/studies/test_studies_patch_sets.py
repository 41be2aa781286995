"""Which squares of images become patches: random ones, a grid, given ones."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mixed_folder import picture
from PIL import Image

from relloc.errors import UsageError
from relloc.studies.patch_sets import DenseGrid, GivenBoxes, RandomPatch, RandomSquares


def test_random_squares_lie_within_the_image_and_depend_on_the_seed_alone() -> None:
    many = RandomSquares(n=500, sides_px=(3, 8, 50))
    boxes = many(9, 12, seed=5)
    assert boxes.shape == (500, 4)
    assert set((boxes[:, 2] - boxes[:, 0]).tolist()) == {3, 8}
    assert (boxes[:, 3] - boxes[:, 1] == boxes[:, 2] - boxes[:, 0]).all()
    assert boxes.min() == 0
    assert boxes[:, 2].max() == 12
    assert boxes[:, 3].max() == 9
    assert (many(9, 12, seed=5) == boxes).all()
    assert (many(9, 12, seed=6) != boxes).any()
    assert len(many(2, 100, seed=5)) == 0


@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    sides=st.lists(st.integers(1, 60), min_size=1, max_size=3, unique=True),
    stride=st.floats(0.05, 1),
)
def test_a_dense_grid_covers_the_image(height, width, sides, stride):
    boxes = DenseGrid(sides_px=sides, stride=stride)(height, width, 0)
    assert len(np.unique(boxes, axis=0)) == len(boxes)
    for side in sides:
        of_side = boxes[boxes[:, 2] - boxes[:, 0] == side]
        if side > min(height, width):
            assert not len(of_side)
            continue
        assert (of_side[:, 3] - of_side[:, 1] == side).all()
        for axis, length in ((0, width), (1, height)):
            starts = np.unique(of_side[:, axis])
            assert starts[0] == 0
            assert starts[-1] == length - side
            largest_step = np.diff(starts).max(initial=0)
            assert largest_step <= max(1, stride * side) + 1
        n_places = len(np.unique(of_side[:, 0])) * len(np.unique(of_side[:, 1]))
        assert len(of_side) == n_places


def test_given_boxes_are_those_of_their_number():
    lists = [np.array([[0, 0, 2, 2]]), np.array([[1, 1, 3, 3], [0, 1, 2, 3]])]
    given_boxes = GivenBoxes(lists=lists)
    assert given_boxes.most == 2
    assert given_boxes(9, 9, 1).tolist() == lists[1].tolist()


def test_a_random_patch_is_a_view_of_a_square_that_fits() -> None:
    view = RandomPatch(sides_px=(30, 60), patch_px=24)
    image = picture(40, 90)
    pixels = view(image, random.Random(3))
    assert pixels.shape == (24, 24, 3)
    rng = random.Random(3)
    rng.choice([30])
    left, top = rng.randint(0, 60), rng.randint(0, 10)
    cut = image.crop((left, top, left + 30, top + 30)).resize((24, 24), Image.Resampling.BILINEAR)
    assert pixels.tobytes() == np.asarray(cut).tobytes()
    # Of a smaller image it is the largest square.
    assert view(picture(20, 90), random.Random(3)).shape == (24, 24, 3)
    assert "30 or 60 px" in str(view)


@pytest.mark.parametrize(
    ("sides_px", "patch_px", "setting"),
    [([], 96, "sides_px"), ([0], 96, "sides_px"), ([9], 0, "patch_px")],
)
def test_a_wrong_view_is_told_by_the_settings_of_its_study(
    sides_px: list[int], patch_px: int, setting: str
) -> None:
    with pytest.raises(UsageError, match=rf"study\.\w+\.{setting} is "):
        RandomPatch(sides_px=sides_px, patch_px=patch_px)
