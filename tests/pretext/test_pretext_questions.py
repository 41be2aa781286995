"""What is asked about the patches of an image, and which answers are right."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from relloc.errors import UsageError
from relloc.geometry import NEIGHBORS, OFFSETS
from relloc.pretext.questions import (
    CENTER_PAIRS,
    AdjacentPairs,
    AllPairs,
    CenterPairs,
    Questions,
    Triplets,
    head_sizes,
)

SETS = {
    "center": CENTER_PAIRS,
    "adjacent": AdjacentPairs(),
    "offsets": AllPairs(),
    "adjacent of 4x4": AdjacentPairs(rows=4),
    "offsets of 4x4": AllPairs(rows=4),
}
every_set = pytest.mark.parametrize("name", SETS)


def truth_of(questions: Questions, b: int) -> Tensor:
    return questions.truth(torch.zeros(b, questions.n_cells, 2, dtype=torch.int64))


def asked_pairs(questions: Questions) -> list[tuple[int, int]]:
    """The cells of each question, found by giving each cell a number of its own."""
    numbers = torch.arange(float(questions.n_cells)).reshape(1, -1, 1)
    neighbors, centers = questions.select(numbers)
    asked = questions.combine([neighbors, 100 * centers]).flatten().tolist()
    return [(int(number) % 100, int(number) // 100) for number in asked]


def offset(neighbor: int, center: int, side: int) -> tuple[int, int]:
    rows, columns = zip(divmod(neighbor, side), divmod(center, side), strict=True)
    return rows[0] - rows[1], columns[0] - columns[1]


def expected_pairs(name: str) -> set[tuple[int, int]]:
    if name == "center":
        return {(neighbor, 4) for neighbor in NEIGHBORS}
    side = 4 if "4x4" in name else 3
    all_pairs = set(itertools.permutations(range(side**2), 2))
    if "offsets" in name:
        return all_pairs
    return {pair for pair in all_pairs if max(map(abs, offset(*pair, side))) == 1}


@every_set
def test_each_pair_is_asked_once_and_its_label_stands_for_its_offset(name: str) -> None:
    questions = SETS[name]
    pairs = asked_pairs(questions)
    assert len(pairs) == len(set(pairs)) == questions.n_questions
    assert set(pairs) == expected_pairs(name)
    side = math.isqrt(questions.n_cells)
    offset_of_label: dict[int, tuple[int, int]] = {}
    for pair, label in zip(pairs, truth_of(questions, 1)[0].tolist(), strict=True):
        of_pair = offset(*pair, side)
        assert offset_of_label.setdefault(label, of_pair) == of_pair
    assert len(set(offset_of_label.values())) == questions.n_outputs == max(offset_of_label) + 1
    columns = questions.columns_of_positions()
    assert columns is not None
    assert [offset_of_label[column] for column in columns] == list(OFFSETS)


@pytest.mark.parametrize(
    ("name", "n_questions", "n_answers", "chance_percent"),
    [
        ("center", 8, 8, 100 / 8),
        ("adjacent", 40, 8, 100 * 6 / 40),
        ("offsets", 72, 24, 100 * 6 / 72),
    ],
)
def test_sizes_and_chance(
    name: str, n_questions: int, n_answers: int, chance_percent: float
) -> None:
    questions = SETS[name]
    assert (questions.n_questions, questions.n_outputs) == (n_questions, n_answers)
    assert questions.chance_percent == pytest.approx(chance_percent)


@every_set
def test_chance_is_what_the_best_answer_without_looking_reaches(name: str) -> None:
    questions = SETS[name]
    truth = truth_of(questions, 1)
    shares = one_hot(truth[0]).double().mean(dim=0)
    # Equal for all questions: the logarithms of how often each answer is right
    blind = shares.log().expand(1, questions.n_questions, -1)
    assert questions.loss(blind, truth).item() == pytest.approx(questions.chance_loss)
    assert 100 * questions.hits(blind, truth).item() / questions.n_questions == pytest.approx(
        questions.chance_percent
    )
    tilted = blind + 0.1 * torch.randn(blind.shape[2], generator=torch.Generator().manual_seed(0))
    assert questions.loss(tilted, truth).item() > questions.chance_loss


def test_a_grid_without_a_center_is_not_asked_about_it() -> None:
    with pytest.raises(UsageError, match=r"grid\.rows=4 .*\bpairs=adjacent"):
        CenterPairs(rows=4)


@every_set
def test_the_gradient_of_each_patch_is_the_sum_over_its_questions(name: str) -> None:
    questions = SETS[name]
    generator = torch.Generator().manual_seed(0)
    cells = torch.randn(
        2, questions.n_cells, 5, dtype=torch.float64, generator=generator, requires_grad=True
    )
    weights = torch.randn(2, questions.n_questions, 5, dtype=torch.float64, generator=generator)
    neighbors, centers = questions.select(cells)
    (questions.combine([neighbors, 3 * centers]) * weights).sum().backward()
    expected = torch.zeros_like(cells)
    for question, (neighbor, center) in enumerate(asked_pairs(questions)):
        expected[:, neighbor] += weights[:, question]
        expected[:, center] += 3 * weights[:, question]
    torch.testing.assert_close(cells.grad, expected)


def center_loss(logits: Tensor) -> Tensor:
    return CENTER_PAIRS.loss(logits, truth_of(CENTER_PAIRS, len(logits)))


def center_hits(logits: Tensor) -> Tensor:
    return CENTER_PAIRS.hits(logits, truth_of(CENTER_PAIRS, len(logits)))


def test_labels_loss_and_hits_are_as_defined() -> None:
    logits = torch.randn(5, 8, 8, generator=torch.Generator().manual_seed(3))
    labels = truth_of(CENTER_PAIRS, 5)
    assert labels.tolist() == [list(range(8))] * 5
    total, right = 0.0, []
    for image in logits.tolist():
        answers = [row.index(max(row)) for row in image]
        right.append(sum(answer == pair for pair, answer in enumerate(answers)))
        total += sum(
            math.log(sum(map(math.exp, row))) - row[pair] for pair, row in enumerate(image)
        )
    assert center_loss(logits).item() == pytest.approx(total / 40, rel=1e-6)
    assert center_hits(logits).tolist() == right
    assert center_hits(20 * torch.eye(8).expand(2, 8, 8)).tolist() == [8, 8]
    assert center_hits(20 * torch.eye(8).roll(1, dims=1).expand(2, 8, 8)).tolist() == [
        0,
        0,
    ]


def test_a_network_that_knows_nothing_has_a_loss_of_log_8() -> None:
    assert center_loss(torch.zeros(3, 8, 8)).item() == pytest.approx(math.log(8))
    assert center_loss(torch.full((3, 8, 8), 7.5)).item() == pytest.approx(math.log(8))


def test_the_loss_of_bfloat16_logits_is_taken_in_float32() -> None:
    logits = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(3)).bfloat16()
    loss = center_loss(logits)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, center_loss(logits.float()))


def test_triplets_are_the_center_and_two_outer_cells_that_share_no_side() -> None:
    questions = Triplets()
    cells = torch.arange(9.0).view(1, 9, 1)
    firsts, centers, seconds = questions.select(cells)
    codes = questions.combine([100 * firsts, 10 * centers, seconds]).flatten().int().tolist()
    found = [(code // 100, code // 10 % 10, code % 10) for code in codes]
    expected = []
    for first, second in itertools.combinations(NEIGHBORS, 2):
        rows_apart = abs(first // 3 - second // 3)
        if rows_apart + abs(first % 3 - second % 3) > 1:
            expected.append((first, 4, second))
    assert found == expected
    assert len(found) == questions.n_questions == questions.n_outputs == 20
    assert questions.chance_percent == pytest.approx(5)
    assert questions.chance_loss == pytest.approx(math.log(20))
    assert head_sizes(questions) == {"n_patches": 3, "n_questions": 20, "n_outputs": 20}
    with pytest.raises(UsageError, match="grid.rows=4"):
        Triplets(rows=4)
