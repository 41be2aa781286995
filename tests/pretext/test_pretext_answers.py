"""Tests questions whose answers also name a turn, or are offsets."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from relloc.errors import UsageError
from relloc.geometry import PatchGrid
from relloc.patches.color import Keep
from relloc.patches.normalize import ByDataset
from relloc.patches.pipeline import PatchPipeline
from relloc.patches.rotation import QuarterTurns
from relloc.pretext.answers import OffsetRegression, WithTurns, with_answers
from relloc.pretext.questions import AdjacentPairs, AllPairs, CenterPairs, Questions, Triplets

GRID = PatchGrid(patch_px=8, gap_px=5, jitter_px=(0, 4), resize=None)
PLAIN = PatchPipeline(grid=GRID, color=Keep(), normalize=ByDataset())
TURNED = dataclasses.replace(PLAIN, rotation=QuarterTurns())
PAIRS = [CenterPairs(), AdjacentPairs(), AllPairs()]
SETS = [*PAIRS, Triplets()]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pairs_of(questions: Questions) -> list[tuple[int, int]]:
    """The cells (neighbor, center) of each question, found by asking with powers of ten."""
    cells = torch.arange(9.0).view(1, 9, 1)
    neighbors, centers = questions.select(cells)
    codes = questions.combine([10 * neighbors, centers]).flatten().int().tolist()
    return [divmod(code, 10) for code in codes]


@pytest.mark.parametrize("of", SETS, ids=lambda of: type(of).__name__)
def test_the_label_of_turned_patches_counts_their_turns(of: CenterPairs) -> None:
    questions = with_answers(of, TURNED, "classes")
    assert questions == WithTurns(questions=of)
    assert questions.n_outputs == 4 * of.n_outputs
    assert questions.chance_percent == pytest.approx(of.chance_percent / 4)
    assert questions.chance_loss == pytest.approx(of.chance_loss + math.log(4))
    drawn = TURNED.draw(50, seeded(0))
    turns = drawn[-1]
    truth = questions.truth(*drawn)
    assert torch.equal(truth % of.n_outputs, of.truth(*drawn))
    assert torch.equal(truth // of.n_outputs, turns.unsqueeze(1).expand_as(truth))
    assert set(turns.tolist()) == {0, 1, 2, 3}
    logits = 20.0 * torch.nn.functional.one_hot(truth, questions.n_outputs)
    assert (questions.hits(logits, truth) == of.n_questions).all()
    assert questions.loss(logits, truth) < 1e-6
    # Right about the cells alone is not right.
    other_turn = logits.roll(of.n_outputs, dims=2)
    assert (questions.hits(other_turn, truth) == 0).all()


@pytest.mark.parametrize("of", PAIRS, ids=lambda of: type(of).__name__)
def test_offsets_are_measured_between_the_patches_that_were_cut(of: CenterPairs) -> None:
    questions = with_answers(of, PLAIN, "regression")
    assert isinstance(questions, OffsetRegression)
    drawn = PLAIN.draw(40, seeded(1))
    truth = questions.truth(*drawn)
    corners = drawn[0].numpy()
    for question, (neighbor, center) in enumerate(pairs_of(of)):
        expected = (corners[:, neighbor] - corners[:, center]) / 8
        np.testing.assert_allclose(truth[:, question].numpy(), expected)
    assert questions.loss(truth, truth) == 0
    wrong = truth + torch.tensor([0.5, -0.25])
    assert questions.loss(wrong, truth).item() == pytest.approx(0.375)
    assert (questions.hits(truth, truth) == of.n_questions).all()
    # One cell further down, with the same jitter, is another offset of cells.
    further = truth + torch.tensor([13 / 8, 0])
    assert (questions.hits(further, truth) == 0).all()


@pytest.mark.parametrize("of", PAIRS, ids=lambda of: type(of).__name__)
@pytest.mark.parametrize("yoked", [False, True])
def test_the_loss_of_guessing_is_that_of_the_best_constant(of: CenterPairs, yoked: bool) -> None:
    grid = dataclasses.replace(GRID, yoked_jitter=yoked)
    questions = OffsetRegression(questions=of, grid=grid)
    patches = dataclasses.replace(PLAIN, grid=grid)
    truth = questions.truth(*patches.draw(20_000, seeded(2)))
    of_zero = questions.loss(torch.zeros_like(truth), truth)
    assert questions.chance_loss == pytest.approx(of_zero.item(), rel=0.003)
    for constant in (0.2, -0.2):
        assert questions.loss(torch.full_like(truth, constant), truth) > of_zero - 1e-3


def test_what_can_not_be_asked_is_refused() -> None:
    with pytest.raises(UsageError, match="rotation="):
        with_answers(CenterPairs(), TURNED, "regression")
    with pytest.raises(UsageError, match="about 3"):
        with_answers(Triplets(), PLAIN, "regression")
    with pytest.raises(UsageError, match="pretext_answers is offset:"):
        with_answers(CenterPairs(), PLAIN, "offset")
    assert with_answers(AllPairs(), PLAIN, "classes") == AllPairs()
