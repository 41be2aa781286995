import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.nn.functional import normalize

from relloc.errors import UsageError
from relloc.evals.knn import Knn, vote
from relloc.features.source import Bank, Batch
from relloc.results import Score

CPU = torch.device("cpu")
K = (1, 5, 20, 100)
N_CLASSES = 5


def drawn(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of a few overlapping classes, of all lengths, so that the vote is not clear."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(N_CLASSES, (n,), generator=generator)
    centers = torch.randn(N_CLASSES, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(99))
    rows = centers[labels] + 2 * torch.randn(n, 16, dtype=torch.float64, generator=generator)
    return rows * torch.rand(n, 1, dtype=torch.float64, generator=generator).exp(), labels


BANK, LABELS = drawn(400, seed=0)
QUERIES, ANSWERS = drawn(150, seed=1)


def voted(bank: Tensor = BANK, labels: Tensor = LABELS, queries: Tensor = QUERIES, **changes: object) -> dict:
    settings = {"k": K, "temperature": 0.07, "n_classes": N_CLASSES}
    return vote(queries, bank, labels, **{**settings, **changes})  # type: ignore[arg-type]


def assert_same(one: dict[int, Tensor], other: dict[int, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_the_vote_is_scikit_learns_with_the_published_weights() -> None:
    found = voted()
    for k in K:
        oracle = KNeighborsClassifier(
            n_neighbors=k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
        )
        expected = oracle.fit(BANK.numpy(), LABELS.numpy()).predict(QUERIES.numpy())
        assert np.array_equal(found[k].numpy(), expected), k
    assert not torch.equal(found[1], found[100])


def test_weights_decide_and_not_counts_alone() -> None:
    similar = normalize(QUERIES, dim=1) @ normalize(BANK, dim=1).T
    nearest = LABELS[similar.topk(100, dim=1).indices]
    counts = torch.stack([torch.bincount(row, minlength=N_CLASSES) for row in nearest])

    def share_of_most_frequent(temperature: float) -> float:
        winners = voted(k=(100,), temperature=temperature)[100]
        return (counts.gather(1, winners.unsqueeze(1)).squeeze(1) == counts.amax(dim=1)).double().mean().item()

    assert share_of_most_frequent(1e6) == 1
    assert share_of_most_frequent(0.07) < 0.95


@pytest.mark.parametrize("chunk", [1, 7, 100, 399, 400])
def test_the_size_of_chunks_changes_nothing(chunk: int) -> None:
    assert_same(voted(chunk=chunk), voted())


def test_the_order_of_the_bank_changes_nothing() -> None:
    order = torch.randperm(len(BANK), generator=torch.Generator().manual_seed(5))
    assert_same(voted(BANK[order], LABELS[order], chunk=64), voted())


def test_the_length_of_rows_and_the_names_of_classes_change_nothing() -> None:
    lengths = torch.rand(len(BANK), 1, dtype=torch.float64, generator=torch.Generator().manual_seed(6)) + 0.1
    assert_same(voted(BANK * lengths, queries=3 * QUERIES), voted())
    renamed = torch.tensor([3, 0, 4, 1, 2])
    assert_same(voted(labels=renamed[LABELS]), {k: renamed[classes] for k, classes in voted().items()})


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_equal_similarities_go_to_the_earlier_row(chunk: int) -> None:
    row = torch.tensor([[3.0, 4.0]])
    bank = torch.cat([-row, row, row, row, row])
    labels = torch.tensor([0, 4, 2, 2, 1])
    found = voted(bank, labels, queries=row, k=(1, 3), chunk=chunk)
    assert found[1].tolist() == [4]
    assert found[3].tolist() == [2]  # of the four, the first three: 4, 2, 2


def test_equal_votes_go_to_the_lower_class() -> None:
    bank = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    query = torch.tensor([[1.0, 0.0]])
    for labels, winner in (([3, 1], 1), ([1, 3], 1), ([4, 0], 0)):
        assert voted(bank, torch.tensor(labels), queries=query, k=(2,))[2].tolist() == [winner]


def test_a_low_temperature_leaves_the_nearest_neighbor_the_last_word() -> None:
    found = voted(BANK.float(), queries=QUERIES.float(), temperature=0.001)
    assert torch.equal(found[100], found[1])


def bank_of(rows: Tensor, labels: Tensor, layers: Sequence[str] = ("avgpool",)) -> Bank:
    return Bank(
        features={layer: rows.float() for layer in layers},
        labels=labels,
        n_classes=N_CLASSES,
        channels=dict.fromkeys(layers, 16),
    )


def evaluation(**changes: object) -> Knn:
    settings = {"k": K, "temperature": 0.07, "layers": ("avgpool",), "batch": 64, "bank_gib": 1.0}
    return Knn(**{**settings, **changes})  # type: ignore[arg-type]


def scores(knn: Knn, train: Bank | None = None, held_out: Bank | None = None) -> list[Score]:
    train, held_out = train or bank_of(BANK, LABELS), held_out or bank_of(QUERIES, ANSWERS)
    return list(knn(train, held_out, device=CPU, seed=0))


def test_scores_are_the_share_of_right_votes_for_each_k() -> None:
    expected = {f"top1_k{k}": 100 * (classes == ANSWERS).double().mean().item() for k, classes in voted().items()}
    found = scores(evaluation())
    assert {score.metric: score.value for score in found} == pytest.approx(expected)
    assert {score.n for score in found} == {150}
    assert 100 / N_CLASSES < min(expected.values()) < max(expected.values()) < 100


@pytest.mark.parametrize("batch", [1, 149, 1000])
def test_the_batch_size_changes_no_score(batch: int) -> None:
    assert scores(evaluation(batch=batch)) == scores(evaluation())


def test_only_avgpool_is_the_published_protocol() -> None:
    layers = ("feature4", "avgpool")
    train, held_out = bank_of(BANK, LABELS, layers), bank_of(QUERIES, ANSWERS, layers)
    found = scores(evaluation(layers=layers), train, held_out)
    protocols = {score.layer: score.protocol for score in found}
    assert protocols["avgpool"] == "3.7 weighted kNN, T=0.07"
    assert protocols["feature4"] == "3.7 weighted kNN, T=0.07; deviation: features of feature4 pooled as in 3.1"


def test_numbers_of_neighbors_beyond_the_bank_are_left_out() -> None:
    small = bank_of(BANK[:20], LABELS[:20])
    assert [score.metric for score in scores(evaluation(), small)] == ["top1_k1", "top1_k5", "top1_k20"]
    with pytest.raises(UsageError, match=r"eval.knn.k \[50, 100\]: the bank has only 20 images"):
        scores(evaluation(k=(50, 100)), small)


def test_a_bank_beyond_the_memory_allowed_is_an_error_that_says_what_to_change() -> None:
    kib = 400 * 16 * 4 / 2**30
    assert scores(evaluation(bank_gib=1.01 * kib))
    with pytest.raises(UsageError, match=r"for 400 images at avgpool, more than bank_gib=.*name fewer layers"):
        scores(evaluation(bank_gib=0.99 * kib))


@dataclasses.dataclass
class Unkept:
    """A bank's features, but not known to be in memory."""

    bank: Bank

    n = property(lambda self: self.bank.n)
    n_classes = property(lambda self: self.bank.n_classes)
    dims = property(lambda self: self.bank.dims)
    channels = property(lambda self: self.bank.channels)

    def batches(self, places: Tensor, size: int, layers: Sequence[str]) -> Iterator[Batch]:
        return self.bank.batches(places, size, layers)


def test_a_source_that_is_no_bank_gives_the_same_scores() -> None:
    train, held_out = Unkept(bank_of(BANK, LABELS)), Unkept(bank_of(QUERIES, ANSWERS))
    assert list(evaluation()(train, held_out, device=CPU, seed=0)) == scores(evaluation())
