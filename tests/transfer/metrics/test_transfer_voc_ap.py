"""Average precision against its definitions written out as loops."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from relloc.data.annotations import Objects
from relloc.transfer.detections import Detections
from relloc.transfer.metrics.voc_ap import (
    AP_IOUS,
    DETECTRON2,
    MMDET,
    MMDET_AREA,
    Definition,
    VocImage,
    average_precision,
    mean_ap,
    printed_ap,
    voc_image,
)

DEFINITIONS = [
    MMDET,
    MMDET_AREA,
    DETECTRON2,
    Definition(points="area", plus_one=True, reference="detectron2"),
]
N_CLASSES = 2


def image(
    found: Sequence[tuple[float, ...]] = (),
    true: Sequence[tuple[float, ...]] = (),
    *,
    difficult: Sequence[int] = (),
    found_classes: Sequence[int] | None = None,
    true_classes: Sequence[int] | None = None,
) -> VocImage:
    """`found` is x1 y1 x2 y2 score, `true` is x1 y1 x2 y2, `difficult` the places of such ones."""
    rows = np.array(found, dtype=np.float32).reshape(-1, 5)
    is_difficult = np.zeros(len(true), dtype=bool)
    is_difficult[list(difficult)] = True
    return VocImage(
        found_boxes=rows[:, :4],
        found_scores=rows[:, 4],
        found_classes=np.array(found_classes or [0] * len(found), dtype=np.int64),
        true_boxes=np.array(true, dtype=np.float32).reshape(-1, 4),
        true_classes=np.array(true_classes or [0] * len(true), dtype=np.int64),
        difficult=is_difficult,
    )


def iou_of(found: np.ndarray, true: np.ndarray, plus_one: bool) -> np.floating:
    """IoU of two boxes, in the type of their numbers."""
    more = found.dtype.type(plus_one)
    width = min(found[2], true[2]) - max(found[0], true[0]) + more
    height = min(found[3], true[3]) - max(found[1], true[1]) + more
    shared = max(width, found.dtype.type(0)) * max(height, found.dtype.type(0))
    area_found = (found[2] - found[0] + more) * (found[3] - found[1] + more)
    area_true = (true[2] - true[0] + more) * (true[3] - true[1] + more)
    union = area_found + area_true - shared
    return shared / max(union, found.dtype.type(1e-6))


def twin(
    images: Sequence[VocImage], number: int, definition: Definition, threshold: float
) -> float:
    """The definition for one class, written out."""
    dtype = np.float64 if definition.reference == "detectron2" else np.float32
    true_boxes = true_boxes_by_image(images, number, definition, dtype)
    n_to_find = sum(not true["difficult"] for boxes in true_boxes for true in boxes)
    if not n_to_find:
        return math.nan
    recalls, precisions = [], []
    n_right = n_wrong = 0
    for image_number, box in detections_by_score(images, number, definition, dtype):
        verdict = verdict_on(box, true_boxes[image_number], definition, threshold)
        n_right += verdict == "right"
        n_wrong += verdict == "wrong"
        recalls.append(n_right / n_to_find)
        precisions.append(dtype(n_right) / dtype(max(n_right + n_wrong, 1)))
    if definition.points == "11":
        total = dtype(0)
        for point in np.arange(0, 1.001, 0.1):
            reached = [p for r, p in zip(recalls, precisions, strict=True) if r >= point]
            total += max(reached, default=dtype(0))
        return float(total / dtype(11))
    area, recall_before = 0.0, 0.0
    for place, recall in enumerate(recalls):
        area += (recall - recall_before) * float(max(precisions[place:]))
        recall_before = recall
    return area


def true_boxes_by_image(
    images: Sequence[VocImage], number: int, definition: Definition, dtype: type
) -> list[list[dict[str, Any]]]:
    of_images = []
    for one in images:
        boxes = []
        for place in np.flatnonzero(one.true_classes == number):
            difficult = bool(one.difficult[place])
            box = one.true_boxes[place].astype(dtype)
            boxes.append({"box": box, "difficult": difficult, "taken": False})
        if definition.reference == "mmdet":
            boxes.sort(key=lambda true: true["difficult"])
        of_images.append(boxes)
    return of_images


def detections_by_score(
    images: Sequence[VocImage], number: int, definition: Definition, dtype: type
) -> list[tuple[int, np.ndarray]]:
    scored = []
    for image_number, one in enumerate(images):
        for place in np.flatnonzero(one.found_classes == number):
            box, score = one.found_boxes[place], float(one.found_scores[place])
            if definition.reference == "detectron2":
                box = np.array([float(f"{value:.1f}") for value in box])
                score = float(f"{score:.3f}")
            scored.append((score, image_number, box.astype(dtype)))
    scored.sort(key=lambda detection: -detection[0])
    return [(image_number, box) for _, image_number, box in scored]


def verdict_on(
    box: np.ndarray, true_boxes: list[dict[str, Any]], definition: Definition, threshold: float
) -> str:
    """Whether a detection is "right", "wrong" or neither; if it is right, its true box is taken."""
    best, best_iou = None, -1.0
    for true in true_boxes:
        iou = iou_of(box, true["box"], definition.plus_one)
        if iou > best_iou:
            best, best_iou = true, iou
    is_above = best_iou > threshold
    is_enough = is_above if definition.reference == "detectron2" else best_iou >= threshold
    if best is None or not is_enough:
        return "wrong"
    if best["difficult"]:
        return "neither"
    if best["taken"]:
        return "wrong"
    best["taken"] = True
    return "right"


def ap(images: Sequence[VocImage], definition: Definition = MMDET, iou: float = 0.5) -> float:
    """Average precision of class 0, which has to agree with the twin."""
    result = average_precision(images, n_classes=N_CLASSES, definition=definition, ious=[iou])
    assert result.shape == (1, N_CLASSES)
    assert result.dtype == (np.float64 if definition is DETECTRON2 else np.float32)
    assert result[0, 0] == pytest.approx(twin(images, 0, definition, iou), rel=1e-6, nan_ok=True)
    return float(result[0, 0])


BOX, OTHER = (10, 10, 29, 29), (60, 60, 79, 79)


def test_a_box_that_is_found_twice_is_wrong_the_second_time() -> None:
    assert ap([image([(*BOX, 0.9), (*OTHER, 0.8)], [BOX, OTHER])]) == 1
    twice = image([(*BOX, 0.9), (*BOX, 0.8), (*OTHER, 0.7)], [BOX, OTHER])
    # Of the eleven recalls, six are reached with precision 1, the others with 2/3.
    assert ap([twice]) == pytest.approx((6 + 5 * 2 / 3) / 11)
    assert ap([twice], MMDET_AREA) == pytest.approx(0.5 + 0.5 * 2 / 3)


def test_a_box_that_is_missing_lowers_recall() -> None:
    assert ap([image([(*BOX, 0.9)], [BOX, OTHER])]) == pytest.approx(6 / 11)
    assert ap([image([(*BOX, 0.9)], [BOX, OTHER])], MMDET_AREA) == 0.5
    assert ap([image([], [BOX])]) == 0


def test_difficult_boxes_count_neither_way() -> None:
    found = [(*OTHER, 0.9), (*OTHER, 0.8), (*BOX, 0.7)]
    assert ap([image(found, [BOX, OTHER], difficult=[1])]) == 1
    assert ap([image(found, [BOX, OTHER])]) < 1
    # A class that has only difficult boxes has no average precision.
    assert math.isnan(ap([image(found, [BOX, OTHER], difficult=[0, 1])]))


def test_a_detection_has_no_second_choice() -> None:
    # Both overlap the first box most, and the second box by more than half.
    true = [(0, 0, 99, 99), (0, 0, 99, 79)]
    found = [(0, 0, 99, 99, 0.9), (0, 0, 99, 92, 0.8)]
    assert ap([image(found, true)]) == pytest.approx(6 / 11)


def test_detections_in_images_without_the_class_are_wrong() -> None:
    empty = image([(*BOX, 0.9)])
    elsewhere = image([(*BOX, 0.8)], [BOX])
    assert ap([empty, elsewhere]) == pytest.approx(0.5)
    other_class = image([(*BOX, 0.9)], [BOX], true_classes=[1])
    assert ap([other_class, elsewhere]) == pytest.approx(0.5)


def test_equal_scores_keep_the_order_of_images_and_of_detections() -> None:
    right, wrong = image([(*BOX, 0.5)], [BOX]), image([(*BOX, 0.5)], [OTHER])
    assert ap([right, wrong]) > ap([wrong, right])
    right_first = image([(*BOX, 0.5), (*OTHER, 0.5)], [BOX])
    wrong_first = image([(*OTHER, 0.5), (*BOX, 0.5)], [BOX])
    assert ap([right_first]) == 1
    assert ap([wrong_first]) == pytest.approx(0.5)


def test_widths_include_the_last_pixel_only_where_asked() -> None:
    # 100 pixels against 50 of them; without + 1, 81 against 36.
    half = [image([(0, 0, 4, 9, 0.9)], [(0, 0, 9, 9)])]
    assert ap(half) == 1
    assert ap(half, MMDET_AREA) == 1
    assert ap(half, dataclasses.replace(MMDET, plus_one=False)) == 0


def test_an_overlap_of_exactly_the_threshold_is_enough_for_mmdet_only() -> None:
    half = [image([(0, 0, 5, 10, 0.9)], [(0, 0, 10, 10)])]
    assert ap(half, dataclasses.replace(MMDET, plus_one=False)) == 1
    assert ap(half, DETECTRON2) == 0
    assert ap(half, DETECTRON2, 0.45) == 1


def test_of_equal_overlaps_mmdet_takes_the_box_that_is_not_difficult() -> None:
    same_box = [image([(*BOX, 0.9)], [BOX, BOX], difficult=[0])]
    assert ap(same_box) == 1
    assert ap(same_box, DETECTRON2) == 0


def test_detectron2_rounds_scores_and_boxes() -> None:
    # The second score is higher by less than a thousandth, so that they are equal.
    close = [image([(*OTHER, 0.5001), (*BOX, 0.5002)], [BOX])]
    assert ap(close) == 1
    assert ap(close, DETECTRON2) == pytest.approx(0.5)
    # A height of 5.04 becomes 5.0, which is not above half.
    wide = [image([(0, 0, 10, 5.04, 0.9)], [(0, 0, 10, 10)])]
    assert ap(wide, MMDET_AREA) == 1
    assert ap(wide, DETECTRON2) == 0


@pytest.mark.parametrize("n_right", range(1, 11))
def test_recalls_are_compared_as_floats(n_right: int) -> None:
    boxes = [(40 * place, 0, 40 * place + 19, 19) for place in range(10)]
    found = [(*box, 0.9) for box in boxes[:n_right]]
    # 0.1 · 3, 0.1 · 6 and 0.1 · 7 are above 3/10, 6/10 and 7/10.
    n_points = n_right + (0 if n_right in (3, 6, 7) else 1)
    assert ap([image(found, boxes)]) == pytest.approx(n_points / 11)


def test_classes_are_matched_apart() -> None:
    both = image(
        [(*BOX, 0.9), (*OTHER, 0.8)],
        [BOX, OTHER],
        found_classes=[1, 0],
        true_classes=[0, 1],
    )
    result = average_precision([both], n_classes=3, definition=MMDET)
    assert result[0, :2].tolist() == [0, 0]
    assert math.isnan(result[0, 2])


def test_the_mean_leaves_out_classes_without_boxes() -> None:
    assert mean_ap(np.array([0.5, np.nan, 0.25])) == 0.375
    assert mean_ap(np.array([np.nan, np.nan])) == 0
    assert printed_ap(0.56449) == 0.564


def test_no_image_at_all() -> None:
    result = average_precision([], n_classes=2, definition=MMDET, ious=AP_IOUS)
    assert result.shape == (10, 2)
    assert np.isnan(result).all()


def test_a_score_that_is_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="1 of 2"):
        average_precision(
            [image([(*BOX, math.nan), (*BOX, 0.5)], [BOX])], n_classes=1, definition=MMDET
        )


def test_an_image_is_made_of_detections_and_annotations() -> None:
    half = Detections(
        boxes=torch.tensor([[0, 0, 9, 9]]).half(),
        scores=torch.ones(1).half(),
        classes=torch.tensor([0]),
    )
    truth = Objects(
        boxes=np.array([[0, 0, 9, 9]], dtype=np.float32),
        xywh=np.array([[0.0, 0, 9, 9]]),
        classes=np.array([0]),
        difficult=np.array([False]),
        crowd=np.array([False]),
        areas=np.array([100.0]),
    )
    assert ap([voc_image(half, truth)]) == 1


coordinates = st.integers(0, 12)
sides = st.integers(1, 8)


@st.composite
def image_strategy(draw: st.DrawFn) -> VocImage:
    """Small boxes on few places, so that equal overlaps, duplicates and equal scores are common."""
    true = draw(st.lists(st.tuples(coordinates, coordinates, sides, sides), max_size=4))
    place = st.tuples(coordinates, coordinates, sides, sides)
    near = st.sampled_from(true) if true else place
    found = draw(
        st.lists(st.tuples(near | place, st.integers(1, 4), st.integers(0, 9)), max_size=6)
    )
    flags = st.lists(st.integers(0, 1), min_size=len(true), max_size=len(true))
    difficult, true_classes = draw(flags), draw(flags)
    rows = []
    for (x, y, width, height), quarters, tenths in found:
        rows.append((x, y, x + width + tenths / 40, y + height, quarters / 4))
    return image(
        rows,
        [(x, y, x + width, y + height) for x, y, width, height in true],
        difficult=np.flatnonzero(difficult).tolist(),
        found_classes=draw(st.lists(st.integers(0, 1), min_size=len(rows), max_size=len(rows))),
        true_classes=true_classes,
    )


@pytest.mark.parametrize("definition", DEFINITIONS, ids=str)
@settings(max_examples=40)
@given(images=st.lists(image_strategy(), min_size=1, max_size=4))
def test_any_images_give_what_the_definition_says(
    definition: Definition, images: list[VocImage]
) -> None:
    ious = (0.5, 0.75)
    result = average_precision(images, n_classes=N_CLASSES, definition=definition, ious=ious)
    for row, iou in enumerate(ious):
        for number in range(N_CLASSES):
            expected = twin(images, number, definition, iou)
            assert result[row, number] == pytest.approx(expected, rel=1e-6, abs=1e-12, nan_ok=True)


def test_many_images_give_what_the_definition_says() -> None:
    generator = np.random.default_rng(1)
    images = []
    for _ in range(60):
        corners = generator.integers(0, 60, (5, 2))
        true = np.concatenate([corners, corners + generator.integers(8, 40, (5, 2))], axis=1)
        moved = true[generator.integers(0, 5, 12)] + generator.integers(-4, 5, (12, 4))
        scores = generator.random((12, 1))
        images.append(
            image(
                np.concatenate([moved, scores], axis=1).tolist(),
                true.tolist(),
                difficult=[0],
                found_classes=generator.integers(0, 2, 12).tolist(),
                true_classes=generator.integers(0, 2, 5).tolist(),
            )
        )
    for definition in DEFINITIONS:
        result = average_precision(images, n_classes=N_CLASSES, definition=definition, ious=AP_IOUS)
        expected = []
        for iou in AP_IOUS:
            expected.append([twin(images, number, definition, iou) for number in range(N_CLASSES)])
        assert 0.01 < np.mean(expected) < 0.9
        np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-9)
