from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from relloc.errors import UsageError
from relloc.transfer.resize import (
    Interpolation,
    all_resized,
    check_box,
    fitted_size,
    interpolated,
    interpolation_table,
    nearest_indices,
)

SIDES = st.integers(1, 150)


@pytest.mark.parametrize(
    ("height", "width", "box", "size"),
    [
        (375, 500, (2048, 512), (512, 683)),  # 682.67 is rounded, not cut
        (500, 375, (2048, 512), (683, 512)),
        (100, 900, (2048, 512), (228, 2048)),  # 227.56: the long side is the limit
        (1024, 2048, (2049, 1025), (1025, 2049)),
        (375, 500, (1024, 256), (256, 341)),  # 341.33
        (2, 3, (3, 1), (1, 2)),  # a half is rounded up
        (1, 5000, (2048, 512), (1, 2048)),  # 0.41 would be no row at all
    ],
)
def test_an_image_is_fitted_into_the_box_and_its_sides_are_rounded(
    height: int, width: int, box: tuple[int, int], size: tuple[int, int]
) -> None:
    assert fitted_size(height, width, box) == size


@pytest.mark.parametrize("box", [(512,), (512, 2048), (512, 0), (512, 512, 512), 512, (512.5, 2)])
def test_a_box_that_is_none_is_refused_by_its_name(box: Any) -> None:
    with pytest.raises(UsageError, match="view.box"):
        check_box("view.box", box)


@given(height=SIDES, width=SIDES, new_height=SIDES, new_width=SIDES)
def test_nearest_pixels_are_those_of_opencv(
    height: int, width: int, new_height: int, new_width: int
) -> None:
    classes = np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8)
    found = classes[nearest_indices(height, new_height)][:, nearest_indices(width, new_width)]
    theirs = cv2.resize(classes, (new_width, new_height), interpolation=cv2.INTER_NEAREST)
    assert np.array_equal(found, theirs)


@given(height=SIDES, width=SIDES, new_height=SIDES, new_width=SIDES)
def test_interpolated_pixels_are_those_of_opencv_within_a_gray_level(
    height: int, width: int, new_height: int, new_width: int
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    (found,) = all_resized([torch.from_numpy(image)], [(new_height, new_width)])
    theirs = cv2.resize(image, (new_width, new_height), interpolation=cv2.INTER_LINEAR)
    assert found.shape == (new_height, new_width, 3)
    assert torch.equal(found, found.round())
    assert (found - torch.from_numpy(theirs).float()).abs().max() <= 1


def test_an_image_at_its_own_size_is_as_it_was() -> None:
    image = torch.randint(0, 256, (7, 9, 3), dtype=torch.uint8)
    assert torch.equal(all_resized([image], [(7, 9)])[0], image.float())


def test_a_part_of_the_resized_image_is_what_the_whole_has_there() -> None:
    image = torch.randint(0, 256, (23, 31, 3), dtype=torch.uint8)
    tables = (interpolation_table(23, 50)[:, 11:30], interpolation_table(31, 40)[:, 5:38])
    rows, columns = (Interpolation.from_table(table) for table in tables)
    found = interpolated(image, rows, columns)
    assert torch.equal(found, all_resized([image], [(50, 40)])[0][11:30, 5:38])
