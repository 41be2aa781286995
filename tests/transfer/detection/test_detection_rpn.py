"""The region proposal network's head, targets and losses beside plain loops and numbers."""

import math

import numpy as np
import plain_detection as plain
import pytest
import torch
from detection_batches import batch_of, random_objects, rows, targets
from torch import Tensor

from relloc.seeds import Use, seed_for
from relloc.transfer.detection.anchors import AnchorGrid, Anchors
from relloc.transfer.detection.batch import DetectionBatch
from relloc.transfer.detection.boxes import RPN_STDS
from relloc.transfer.detection.rpn import (
    AnchorTargets,
    RpnHead,
    RpnTraining,
    anchor_targets,
    rpn_losses,
)
from relloc.transfer.detection.sampling import priorities

CPU = torch.device("cpu")
GRID = AnchorGrid(strides=[16], sizes=[[32, 64]])
ONE = AnchorGrid(strides=[16], sizes=[[32]], ratios=[1.0])


def test_the_head_answers_in_the_order_of_the_anchors() -> None:
    head = RpnHead(4, GRID.per_cell, torch.Generator().manual_seed(0))
    maps = [torch.randn(2, 4, 3, 5), torch.randn(2, 4, 2, 2)]
    scores, offsets = head(maps)
    assert scores.shape == (2, (15 + 4) * 6)
    first = 0
    for level_map in maps:
        hidden = head.conv(level_map).relu()
        score_maps, offset_maps = head.score(hidden), head.move(hidden)
        number = first
        for row in range(level_map.shape[2]):
            for column in range(level_map.shape[3]):
                for shape in range(6):
                    assert torch.equal(scores[:, number], score_maps[:, shape, row, column])
                    own = offset_maps[:, 4 * shape : 4 * shape + 4, row, column]
                    assert torch.equal(offsets[:, number], own)
                    number += 1
        first = number


def test_the_head_starts_with_small_weights_and_no_biases() -> None:
    head = RpnHead(256, 15, torch.Generator().manual_seed(0))
    for layer in (head.conv, head.score, head.move):
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert layer.bias is not None
        assert not layer.bias.any()


def by_loops(
    anchors: Anchors, batch: DetectionBatch, training: RpnTraining
) -> list[tuple[set[int], set[int], list[int]]]:
    """For each image the positive and negative anchors that are chosen, and all assignments."""
    answers = []
    boxes = rows(anchors.boxes)
    for image, (size, objects) in enumerate(zip(batch.sizes, batch.targets, strict=True)):
        used = []
        for number, box in enumerate(boxes):
            row, column = divmod(number // GRID.per_cell, batch.images.shape[3] // 16)
            is_own = 16 * row < math.ceil(size[0] / 32) * 32
            is_own &= 16 * column < math.ceil(size[1] / 32) * 32
            is_inside = box[0] >= 0 and box[1] >= 0 and box[2] < size[1] and box[3] < size[0]
            if is_own and (is_inside or training.use_crossing_anchors):
                used.append(number)
        table = plain.overlap_table(rows(objects.boxes), [boxes[number] for number in used])
        # Ties are those of float32.
        assigned = plain.assign(table.astype(np.float32), 0.7, 0.3, 0.3)
        seed = seed_for(Use.ANCHOR_SAMPLE, batch.seeds[image])
        order = priorities([seed], anchors.ids)[0].tolist()
        positive = [number for number, box in zip(used, assigned, strict=True) if box >= 0]
        negative = [number for number, box in zip(used, assigned, strict=True) if box == -1]
        positive.sort(key=order.__getitem__)
        negative.sort(key=order.__getitem__)
        positive = positive[: training.anchors_per_image // 2]
        negative = negative[: training.anchors_per_image - len(positive)]
        of_anchors = dict(zip(used, assigned, strict=True))
        answers.append((set(positive), set(negative), [of_anchors[p] for p in sorted(positive)]))
    return answers


@pytest.mark.parametrize("crossing", [False, True])
def test_targets_are_those_of_plain_loops(crossing: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    sizes = [(96, 130), (120, 90), (64, 64)]
    objects = [
        targets([[0, 0, 47, 47], [32.5, 30, 80, 64], [2, 2, 2.5, 2.5], [5, 5, 125, 90]]),
        random_objects(5, sizes[1], 3, generator),
        targets([]),
    ]
    batch = batch_of(sizes, objects)
    training = RpnTraining(anchors_per_image=24, use_crossing_anchors=crossing)
    anchors = GRID.at([(8, 10)], CPU)
    chosen = anchor_targets(anchors, batch, training)
    for image, (positive, negative, boxes) in enumerate(by_loops(anchors, batch, training)):
        places = chosen.positive[image].nonzero().flatten()
        assert set(places.tolist()) == positive
        assert set(chosen.negative[image].nonzero().flatten().tolist()) == negative
        assert torch.equal(chosen.boxes[image, places], batch.targets[image].boxes[boxes])
    assert chosen.positive.sum(dim=1)[:2].min() > 0
    assert chosen.negative.sum(dim=1).min() > 0


def chosen_of(
    boxes: list[list[float]], size: tuple[int, int] = (96, 96), *, crossing: bool = False
) -> tuple[list[list[float]], Tensor]:
    """The positive anchors of one image of 96 x 96 px, and their boxes."""
    anchors = ONE.at([(6, 6)], CPU)
    training = RpnTraining(use_crossing_anchors=crossing)
    chosen = anchor_targets(anchors, batch_of([size], [targets(boxes)]), training)
    return anchors.boxes[chosen.positive[0]].tolist(), chosen.boxes[0, chosen.positive[0]]


def test_an_anchor_that_leaves_the_image_is_not_used_and_a_lesser_one_takes_the_box() -> None:
    # The anchor of the same place has its upper left corner outside.
    box = [[0.0, 0.0, 16.0, 32.0]]
    best, _ = chosen_of(box, crossing=True)
    assert best == [[-16, 0, 16, 32], [0, 0, 32, 32]]  # both overlap by a half
    inside, _ = chosen_of(box)
    assert inside == [[0, 0, 32, 32]]
    # Overlaps by .3 and less are of no use, also where only an outside anchor fits.
    assert chosen_of([[0.0, 0.0, 8.0, 32.0]])[0] == []


def test_the_border_is_that_of_the_image_before_padding() -> None:
    box = [[50.0, 50.0, 96.0, 96.0]]
    assert chosen_of(box, (97, 97))[0] == [[64, 64, 96, 96]]
    assert chosen_of(box, (96, 96))[0] == [[48, 48, 80, 80]]


def test_a_box_smaller_than_a_pixel_has_no_anchor() -> None:
    assert chosen_of([[40.0, 40.0, 40.4, 40.3]])[0] == []


def test_a_box_of_low_overlap_takes_its_best_anchor_from_another_box() -> None:
    boxes = [[16.0, 16, 48, 48], [16, 16, 40, 40]]
    anchors, own = chosen_of(boxes)
    assert anchors == [[16, 16, 48, 48]]
    assert own.tolist() == [boxes[1]]  # 576 / 1024 pixels, less than the first box's all


def test_the_choice_of_an_image_does_not_depend_on_the_rest_of_the_batch() -> None:
    generator = torch.Generator().manual_seed(3)
    sizes = [(96, 130), (200, 160)]
    objects = [random_objects(4, size, 3, generator) for size in sizes]
    training = RpnTraining(anchors_per_image=40, use_crossing_anchors=True)
    alone = GRID.at([(6, 10)], CPU)
    together = GRID.at([(14, 10)], CPU)
    one = anchor_targets(alone, batch_of(sizes[:1], objects[:1], [77]), training)
    both = anchor_targets(together, batch_of(sizes[::-1], objects[::-1], [5, 77]), training)
    for name in ("positive", "negative"):
        chosen, again = getattr(one, name)[0], getattr(both, name)[1]
        assert torch.equal(alone.boxes[chosen], together.boxes[again])
        assert chosen.any()
    other = anchor_targets(alone, batch_of(sizes[:1], objects[:1], [78]), training)
    assert not torch.equal(one.negative, other.negative)


def test_losses_are_divided_by_the_anchors_of_their_group() -> None:
    anchors = ONE.at([(2, 2)], CPU)
    positive = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    negative = torch.tensor([[0, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    boxes = anchors.boxes.expand(3, 4, 4) + 4
    chosen = AnchorTargets(positive=positive, negative=negative, boxes=boxes)
    scores = torch.zeros(3, 4)
    offsets = torch.zeros(3, 4, 4)
    losses = rpn_losses(scores, offsets, anchors, chosen, [0, 0, 1])
    # Each loss is log 2; an image counts at least one positive and one negative anchor.
    first_group = 7 / (2 + 1 + 1 + 4)
    second_group = 1 / (1 + 1)
    expected = math.log(2) * (2 / 3 * first_group + 1 / 3 * second_group)
    assert losses["rpn_score"].item() == pytest.approx(expected)
    # An offset of 4 of 32 px in x and in y, and no difference of sides.
    expected = 2 * 4 / 32 * (2 / 3 * 2 / 8 + 1 / 3 * 1 / 2)
    assert losses["rpn_box"].item() == pytest.approx(expected)


def test_losses_are_those_of_plain_loops_and_have_gradients_at_chosen_anchors_alone() -> None:
    generator = torch.Generator().manual_seed(4)
    sizes = [(96, 130), (120, 90)]
    objects = [random_objects(4, size, 3, generator) for size in sizes]
    batch = batch_of(sizes, objects)
    anchors = GRID.at([(8, 10)], CPU)
    chosen = anchor_targets(anchors, batch, RpnTraining(anchors_per_image=20))
    n = len(anchors.boxes)
    scores = torch.randn(2, n, generator=generator, requires_grad=True)
    offsets = torch.randn(2, n, 4, generator=generator, requires_grad=True)
    losses = rpn_losses(scores, offsets, anchors, chosen, [0, 0])
    score_sum, box_sum, count = 0.0, 0.0, 0
    for image in range(2):
        for number in range(n):
            is_positive = bool(chosen.positive[image, number])
            if not is_positive and not chosen.negative[image, number]:
                continue
            count += 1
            logit = scores[image, number].item()
            score_sum += math.log(1 + math.exp(-logit if is_positive else logit))
            if is_positive:
                reference = anchors.boxes[number].tolist()
                wanted = plain.encode(reference, chosen.boxes[image, number].tolist(), RPN_STDS)
                given = offsets[image, number].tolist()
                box_sum += sum(abs(g - w) for g, w in zip(given, wanted, strict=True))
    assert chosen.positive.sum(dim=1).min() > 0
    assert losses["rpn_score"].item() == pytest.approx(score_sum / count, rel=1e-4)
    assert losses["rpn_box"].item() == pytest.approx(box_sum / count, rel=1e-4)

    sum(losses.values()).backward()
    assert scores.grad is not None
    assert offsets.grad is not None
    assert torch.equal(scores.grad != 0, chosen.positive | chosen.negative)
    assert torch.equal((offsets.grad != 0).all(dim=2), chosen.positive)
