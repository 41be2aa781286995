"""Proposals beside plain loops."""

import plain_detection as plain
import pytest
import torch
from detection_batches import rows

from relloc.transfer.detection.anchors import AnchorGrid
from relloc.transfer.detection.boxes import RPN_STDS
from relloc.transfer.detection.proposals import C4_TEST, C4_TRAINING, ProposalCounts, propose
from relloc.transfer.resize import Size

CPU = torch.device("cpu")
COUNTS = ProposalCounts(before_nms=60, after_nms=25)


def outputs(n_images: int, n_anchors: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n_anchors)
    scores = torch.randn(n_images, n_anchors, generator=generator)
    return scores, torch.randn(n_images, n_anchors, 4, generator=generator) * 0.4


def by_loops(
    scores: list[float], offsets: list[list[float]], boxes: list[list[float]], size: Size
) -> list[list[float]]:
    best = sorted(range(len(scores)), key=lambda number: -scores[number])[: COUNTS.before_nms]
    decoded, kept_scores = [], []
    for number in best:
        box = plain.clip(plain.decode(boxes[number], offsets[number], RPN_STDS), size)
        if box[2] > box[0] and box[3] > box[1]:
            decoded.append(box)
            kept_scores.append(scores[number])
    kept = plain.suppress(decoded, kept_scores, COUNTS.nms_overlap)
    return [decoded[place] for place in kept[: COUNTS.after_nms]]


def test_proposals_are_those_of_plain_loops() -> None:
    grid = AnchorGrid(strides=[16], sizes=[[32, 64]])
    anchors = grid.at([(8, 6)], CPU)
    sizes = [(120, 90), (61, 70)]
    scores, offsets = outputs(2, len(anchors.boxes))
    found = propose(scores, offsets, anchors, sizes, COUNTS)
    for image, size in enumerate(sizes):
        own = anchors.of_images([size])[0]
        expected = by_loops(
            rows(scores[image, own]), rows(offsets[image, own]), rows(anchors.boxes[own]), size
        )
        assert len(expected) > 10
        assert torch.allclose(found[image], torch.tensor(expected), atol=1e-3)
    # They do not depend on the other image of the batch.
    small = grid.at([(4, 6)], CPU)
    own = anchors.of_images(sizes[1:])[0]
    alone = propose(scores[1:, own], offsets[1:, own], small, sizes[1:], COUNTS)
    assert torch.equal(alone[0], found[1])


def test_boxes_outside_of_the_image_count_among_the_best_but_are_dropped() -> None:
    grid = AnchorGrid(strides=[16], sizes=[[16]], ratios=[1.0])
    anchors = grid.at([(2, 4)], CPU)
    scores = torch.tensor([[8.0, 7, 6, 5, 4, 3, 2, 1]])
    offsets = torch.zeros(1, 8, 4)
    offsets[0, 0, 0] = -2  # moved to the left by two widths
    counts = ProposalCounts(before_nms=3, after_nms=10)
    (found,) = propose(scores, offsets, anchors, [(32, 64)], counts)
    assert found.tolist() == [[8, 0, 24, 8], [24, 0, 40, 8]]


def test_levels_do_not_suppress_each_other_and_are_ranked_together() -> None:
    grid = AnchorGrid(strides=[32, 64], sizes=[[32], [32]], ratios=[1.0])
    anchors = grid.at([(2, 2), (1, 1)], CPU)
    assert anchors.boxes[0].tolist() == anchors.boxes[4].tolist()
    scores = torch.tensor([[1.0, 0, 0.5, -1, 2]])
    counts = ProposalCounts(before_nms=2, after_nms=3)
    (found,) = propose(scores, torch.zeros(1, 5, 4), anchors, [(64, 64)], counts)
    # Two of the first level, and the only one of the second, which is the best.
    assert found.tolist() == [[0, 0, 16, 16], [0, 0, 16, 16], [0, 16, 16, 48]]
    (found,) = propose(
        scores,
        torch.zeros(1, 5, 4),
        anchors,
        [(64, 64)],
        ProposalCounts(before_nms=9, after_nms=1),
    )
    assert found.tolist() == [[0, 0, 16, 16]]


def test_outputs_that_are_not_finite_give_no_boxes_that_are_not() -> None:
    anchors = AnchorGrid(strides=[16], sizes=[[32]], ratios=[1.0]).at([(2, 2)], CPU)
    scores = torch.tensor([[torch.nan, 1, 2, torch.inf]])
    offsets = torch.zeros(1, 4, 4)
    offsets[0, 1] = torch.nan
    offsets[0, 2] = torch.tensor([torch.inf, 0, torch.inf, -torch.inf])
    (found,) = propose(scores, offsets, anchors, [(32, 32)], COUNTS)
    assert found.tolist() == [[0, 0, 32, 32]]


def test_the_numbers_are_those_of_the_protocol() -> None:
    assert (C4_TRAINING.before_nms, C4_TRAINING.after_nms) == (12_000, 2_000)
    assert (C4_TEST.before_nms, C4_TEST.after_nms) == (6_000, 1_000)
    assert C4_TRAINING.nms_overlap == C4_TEST.nms_overlap == pytest.approx(0.7)


def test_no_images_have_no_proposals() -> None:
    anchors = AnchorGrid(strides=[16], sizes=[[32]]).at([(2, 2)], CPU)
    assert propose(torch.zeros(0, 12), torch.zeros(0, 12, 4), anchors, [], COUNTS) == []
