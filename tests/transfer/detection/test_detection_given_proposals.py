"""Regions of given proposals beside plain loops and hand-made cases, in fast-rcnn's geometry."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from made_objects import ProposedRectangles
from PIL import ImageOps

from relloc.data.annotations import Objects, ProposedImages
from relloc.transfer.detection.given_proposals import (
    Candidates,
    MakeRegionSample,
    MirroredToo,
    RegionRule,
    candidates_of,
    choose_candidates,
    pixel_overlaps,
    target_statistics,
    to_region_batch,
)
from relloc.transfer.resize import FittedImage

CPU = torch.device("cpu")
Box = Sequence[float]


def plain_overlap(one: Box, other: Box) -> float:
    """The overlap of two boxes as sets of pixels."""
    pixels = []
    for left, top, right, bottom in (one, other):
        columns = range(int(left), int(right) + 1)
        rows = range(int(top), int(bottom) + 1)
        pixels.append({(x, y) for x in columns for y in rows})
    return len(pixels[0] & pixels[1]) / len(pixels[0] | pixels[1])


def objects_of(boxes: Sequence[Box], classes: Sequence[int]) -> Objects:
    corners = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    sides = corners[:, 2:] - corners[:, :2]
    n = len(corners)
    return Objects(
        boxes=corners.astype(np.float32),
        xywh=np.concatenate([corners[:, :2], sides], axis=1),
        classes=np.array(classes, dtype=np.int64),
        difficult=np.ones(n, bool),
        crowd=np.zeros(n, bool),
        areas=sides.prod(axis=1),
    )


def boxes_of(*rows: Box) -> np.ndarray:
    return np.array(rows, dtype=np.float32).reshape(-1, 4)


def test_overlaps_are_those_of_sets_of_pixels() -> None:
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 12, (20, 2, 2))
    boxes = np.sort(corners, axis=1).reshape(-1, 4).astype(np.float32)
    found = pixel_overlaps(boxes[:8], boxes[8:])
    for row, column in np.ndindex(8, 12):
        expected = plain_overlap(boxes[row].tolist(), boxes[8 + column].tolist())
        assert found[row, column] == pytest.approx(expected)
    # A box of a single pixel has an area, and boxes that only touch share none.
    assert pixel_overlaps(
        boxes_of((3, 3, 3, 3)), boxes_of((3, 3, 3, 3), (4, 3, 4, 3))
    ).tolist() == [[1, 0]]


def test_objects_come_first_and_each_proposal_belongs_to_the_first_that_it_overlaps_most() -> None:
    objects = objects_of([(0, 0, 9, 9), (10, 0, 19, 9), (0, 0, 9, 9)], [4, 5, 6])
    proposals = boxes_of((0, 0, 9, 9), (5, 0, 14, 9), (12, 0, 19, 9), (50, 50, 60, 60))
    found = candidates_of(objects, proposals)
    assert found.boxes.tolist() == [*objects.boxes.tolist(), *proposals.tolist()]
    # Equal boxes of two objects are each their own.
    assert found.objects.tolist() == [0, 1, 2, 0, 0, 1, 0]
    assert found.overlaps == pytest.approx([1, 1, 1, 1, 1 / 3, 0.8, 0])


def test_an_image_without_objects_has_no_overlaps() -> None:
    found = candidates_of(objects_of([], []), boxes_of((0, 0, 9, 9)))
    assert found.overlaps.tolist() == [0]
    assert choose_candidates(found, RegionRule(), 0)[0].tolist() == []
    none = candidates_of(objects_of([], []), boxes_of())
    assert choose_candidates(none, RegionRule(), 0)[1] == 0


def candidates_with(overlaps: Sequence[float]) -> Candidates:
    return Candidates(
        boxes=np.zeros((len(overlaps), 4), np.float32),
        overlaps=np.array(overlaps),
        objects=np.zeros(len(overlaps), np.int64),
    )


@pytest.mark.parametrize(
    ("of_objects", "background", "expected"),
    [
        (40, 90, (16, 48)),  # enough of both
        (5, 90, (5, 59)),  # background fills up
        (40, 10, (16, 10)),  # objects do not
        (0, 90, (0, 64)),
        (3, 0, (3, 0)),
    ],
)
def test_a_quarter_is_of_objects_and_background_fills_up(
    of_objects: int, background: int, expected: tuple[int, int]
) -> None:
    overlaps = [0.5, 1.0, 0.7] * 20
    too_little = [0.0, 0.09999]
    given = candidates_with(
        [*overlaps[:of_objects], *[0.1, 0.4999] * (background // 2), *too_little]
    )
    chosen, n_positive = choose_candidates(given, RegionRule(), 3)
    assert (n_positive, len(chosen) - n_positive) == expected
    assert len(set(chosen.tolist())) == len(chosen)
    found = given.overlaps[chosen]
    assert (found[:n_positive] >= 0.5).all()
    assert ((found[n_positive:] >= 0.1) & (found[n_positive:] < 0.5)).all()


def test_the_choice_depends_on_the_seed_alone_and_takes_all_alike() -> None:
    given = candidates_with([0.6] * 32 + [0.3] * 96)
    counts = np.zeros(128)
    for seed in range(200):
        chosen, _ = choose_candidates(given, RegionRule(), seed)
        again, _ = choose_candidates(given, RegionRule(), seed)
        assert chosen.tolist() == again.tolist()
        counts[chosen] += 1
    # 100 of 200 are expected of each, with a deviation of 7.
    assert np.abs(counts - 100).max() < 35


def test_regions_know_their_objects_and_are_brought_to_the_resized_image() -> None:
    images = ProposedRectangles(n=6)
    assert isinstance(images, ProposedImages)
    # 48 x 64 px are brought to 96 x 128.
    make = MakeRegionSample(images=images, augment=FittedImage(box=[128, 96]))
    samples = [make(0, 1), make(4, 2)]
    assert [sample.size for sample in samples] == [(96, 128), (128, 85)]
    for index, sample in zip((0, 4), samples, strict=True):
        objects = images.objects(index)
        (truth,) = objects.boxes.tolist()
        for box, own, class_, positive in zip(
            sample.boxes.tolist(),
            sample.object_boxes.tolist(),
            sample.classes.tolist(),
            sample.positive.tolist(),
            strict=True,
        ):
            assert positive == (plain_overlap(box, truth) >= 0.5)
            assert class_ == (objects.classes[0] if positive else 2)
            assert own == (truth if positive else box)
        assert sample.positive.any()
        assert not sample.positive.all()
    batch = to_region_batch(samples, [0, 0], CPU)
    # Padded to the largest, and not to multiples of 32.
    assert batch.images.shape == (2, 3, 128, 128)
    assert len(set(batch.seeds.tolist())) == len(batch.regions.boxes) == len(batch.seeds)
    assert batch.seeds[: len(samples[0].boxes)].tolist() == samples[0].seeds.tolist()
    regions = batch.regions
    n_first = len(samples[0].boxes)
    assert regions.images.tolist() == [0] * n_first + [1] * len(samples[1].boxes)
    assert torch.equal(regions.boxes[:n_first], 2 * torch.from_numpy(samples[0].boxes))
    scales = torch.tensor([85 / 48, 128 / 72, 85 / 48, 128 / 72])
    expected = torch.from_numpy(samples[1].object_boxes) * scales
    torch.testing.assert_close(regions.object_boxes[n_first:], expected)
    none = to_region_batch([], [], CPU)
    assert (none.regions.boxes.shape, len(none.images), len(none.seeds)) == ((0, 4), 0, 0)


def test_each_image_comes_once_more_as_its_mirror_image() -> None:
    images = ProposedRectangles(n=5, wrong=(3,))
    both = MirroredToo(images)
    assert isinstance(both, ProposedImages)
    assert len(both) == 10
    assert set(both.unusable()) == {3, 8}
    for index in (0, 1, 2, 4):
        assert both.source(5 + index) == images.source(index)
        assert both.size(5 + index) == images.size(index)
        assert np.array_equal(both.read(index), images.read(index))
        assert np.array_equal(both.read(5 + index), ImageOps.mirror(images.read(index)))
        height, width = images.size(index)
        canvas = np.zeros((height, width))
        for original, mirrored in (
            (images.proposals(index), both.proposals(5 + index)),
            (images.objects(index).boxes, both.objects(5 + index).boxes),
        ):
            for box, other in zip(original.astype(int), mirrored.astype(int), strict=True):
                canvas[:] = 0
                canvas[box[1] : box[3] + 1, box[0] : box[2] + 1] = 1
                inside = canvas[:, ::-1][other[1] : other[3] + 1, other[0] : other[2] + 1]
                assert inside.all()
                assert inside.size == canvas.sum()
        xywh = both.objects(5 + index).xywh
        corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
        assert corners.tolist() == both.objects(5 + index).boxes.tolist()
        assert both.objects(index).boxes.tolist() == images.objects(index).boxes.tolist()


def plain_offsets(reference: Box, box: Box) -> list[float]:
    """The offsets of fast-rcnn, whose sides are x2 - x1."""
    width, height = reference[2] - reference[0], reference[3] - reference[1]
    shift_x = (box[0] + box[2] - reference[0] - reference[2]) / 2 / width
    shift_y = (box[1] + box[3] - reference[1] - reference[3]) / 2 / height
    ratio_x = math.log((box[2] - box[0]) / width)
    ratio_y = math.log((box[3] - box[1]) / height)
    return [shift_x, shift_y, ratio_x, ratio_y]


def test_statistics_of_targets_are_those_of_all_candidates_of_objects() -> None:
    images = MirroredToo(ProposedRectangles(n=9))
    indices = [0, 1, 2, 4, 6, 9, 10, 11, 13, 15]
    means, stds = target_statistics(images, indices)
    by_class: dict[int, list[list[float]]] = {0: [], 1: []}
    for index in indices:
        objects = images.objects(index)
        (truth,) = objects.boxes.tolist()
        # The object itself is one of its candidates.
        for box in [truth, *images.proposals(index).tolist()]:
            if plain_overlap(box, truth) >= 0.5:
                by_class[int(objects.classes[0])].append(plain_offsets(box, truth))
    for class_, offsets in by_class.items():
        assert len(offsets) > 10
        assert means[class_].tolist() == pytest.approx(np.mean(offsets, axis=0), abs=1e-6)
        assert stds[class_].tolist() == pytest.approx(np.std(offsets, axis=0), abs=1e-6)
    # Each shift to the right is one to the left in the mirror image.
    assert means[:, 0].tolist() == pytest.approx([0, 0], abs=1e-6)


def test_a_class_without_candidates_is_divided_by_one() -> None:
    only_red = ProposedRectangles(n=3, near=0, far=0)
    means, stds = target_statistics(only_red, [0, 2])
    # Of the first class there are the objects themselves, of the second nothing.
    assert means.tolist() == [[0] * 4] * 2
    assert stds.tolist() == [[1] * 4] * 2
