"""Anchors beside plain loops, and which of them an image may use."""

import plain_detection as plain
import pytest
import torch

from relloc.transfer.detection.anchors import RATIOS, AnchorGrid

CPU = torch.device("cpu")
C4 = AnchorGrid(strides=[16], sizes=[[32, 64, 128, 256, 512]])
ONE = AnchorGrid(strides=[16], sizes=[[32]], ratios=[1.0])


def test_anchors_are_those_of_the_plain_twin_and_not_rounded() -> None:
    anchors = C4.at([(3, 4)], CPU)
    expected = plain.anchors(3, 4, 16, C4.sizes[0], RATIOS)
    assert torch.allclose(anchors.boxes, torch.tensor(expected), atol=1e-4)
    assert len(anchors.boxes) == 3 * 4 * 15
    # 32 px at twice as wide as high is 45.25 x 22.63, centered on the corner of the image.
    assert anchors.boxes[0].tolist() == pytest.approx(
        [-22.627417, -11.313708, 22.627417, 11.313708]
    )


def test_levels_follow_one_another_with_their_own_stride_and_size() -> None:
    grid = AnchorGrid(strides=[8, 64], sizes=[[64], [512]])
    anchors = grid.at([(4, 6), (1, 2)], CPU)
    expected = plain.anchors(4, 6, 8, [64], RATIOS) + plain.anchors(1, 2, 64, [512], RATIOS)
    assert torch.allclose(anchors.boxes, torch.tensor(expected), atol=1e-4)
    assert list(anchors.of_levels) == [72, 6]
    centers = (anchors.boxes[:, :2] + anchors.boxes[:, 2:]) / 2
    assert torch.allclose(anchors.centers, centers, atol=1e-4)


def test_an_anchor_that_touches_the_right_or_lower_edge_is_not_inside() -> None:
    anchors = ONE.at([(4, 4)], CPU)
    # The anchor of cell (1, 1) is 0, 0, 32, 32.
    place = 5
    assert anchors.boxes[place].tolist() == [0, 0, 32, 32]
    inside = anchors.inside([(32, 32), (33, 32), (32, 33), (33, 33)])
    assert inside[:, place].tolist() == [False, False, False, True]
    # No other one lies inside of 33 x 33: they start or end outside.
    assert inside.sum(dim=1).tolist() == [0, 0, 0, 1]


def test_inside_is_of_the_image_without_its_padding() -> None:
    anchors = ONE.at([(8, 8)], CPU)
    inside = anchors.inside([(100, 70)])[0]
    for box, is_inside in zip(anchors.boxes.tolist(), inside.tolist(), strict=True):
        x1, y1, x2, y2 = box
        assert is_inside == (x1 >= 0 and y1 >= 0 and x2 < 70 and y2 < 100)
    assert inside.any()


def test_an_image_has_the_cells_that_it_would_have_alone() -> None:
    # 40 x 70 is padded to 64 x 96 px, which are 4 x 6 cells, in a batch of 160 x 128 px.
    anchors = C4.at([(10, 8)], CPU)
    own = anchors.of_images([(40, 70), (160, 128)])
    assert own.sum(dim=1).tolist() == [4 * 6 * 15, 10 * 8 * 15]
    assert anchors.centers[own[0]].max(dim=0).values.tolist() == [80, 48]


def test_ids_do_not_depend_on_padding_and_are_all_different() -> None:
    grid = AnchorGrid(strides=[8, 16], sizes=[[32], [64]])
    alone = grid.at([(8, 12), (4, 6)], CPU)
    padded = grid.at([(20, 16), (10, 8)], CPU)
    own = padded.of_images([(40, 70)])[0]
    assert torch.equal(padded.ids[own], alone.ids)
    assert torch.equal(padded.boxes[own], alone.boxes)
    assert len(padded.ids.unique()) == len(padded.ids)
    assert padded.ids.max() < 2**31


def test_what_cannot_be_a_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="strides"):
        AnchorGrid(strides=[8, 16], sizes=[[32]])
    with pytest.raises(ValueError, match="strides"):
        AnchorGrid(strides=[8, 16], sizes=[[32], [32, 64]])
    with pytest.raises(ValueError, match="5000"):
        ONE.at([(1, 5000)], CPU)
