import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.nn.functional import normalize

from relloc.features import voting
from relloc.features.voting import vote

K = (1, 5, 20, 100)
N_CLASSES = 5


def drawn(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of a few overlapping classes, of all lengths, so that the vote is not clear."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(N_CLASSES, (n,), generator=generator)
    centers = torch.randn(
        N_CLASSES, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(99)
    )
    rows = centers[labels] + 2 * torch.randn(n, 16, dtype=torch.float64, generator=generator)
    return rows * torch.rand(n, 1, dtype=torch.float64, generator=generator).exp(), labels


BANK, LABELS = drawn(400, seed=0)
QUERIES, ANSWERS = drawn(150, seed=1)


def voted(
    bank: Tensor = BANK, labels: Tensor = LABELS, queries: Tensor = QUERIES, **changes: object
) -> dict:
    settings = {"k": K, "temperature": 0.07, "n_classes": N_CLASSES}
    return vote(queries, bank, labels, **{**settings, **changes})  # type: ignore[arg-type]


def assert_same(one: dict[int, Tensor], other: dict[int, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_the_vote_is_scikit_learns_with_the_published_weights() -> None:
    found = voted()
    for k in K:
        oracle = KNeighborsClassifier(
            n_neighbors=k,
            metric="cosine",
            algorithm="brute",
            weights=lambda distance: np.exp((1 - distance) / 0.07),
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
        return (
            (counts.gather(1, winners.unsqueeze(1)).squeeze(1) == counts.amax(dim=1))
            .double()
            .mean()
            .item()
        )

    assert share_of_most_frequent(1e6) == 1
    assert share_of_most_frequent(0.07) < 0.95


@pytest.mark.parametrize(
    ("chunk", "tile"), [(7, 150), (100, 1), (399, 16), (400, 149), (1000, 1000)]
)
def test_the_size_of_chunks_and_tiles_changes_nothing(chunk: int, tile: int) -> None:
    assert_same(voted(chunk=chunk, tile=tile), voted())


def test_the_order_of_the_bank_changes_nothing() -> None:
    order = torch.randperm(len(BANK), generator=torch.Generator().manual_seed(5))
    assert_same(voted(BANK[order], LABELS[order], chunk=64), voted())


def test_the_length_of_rows_and_the_names_of_classes_change_nothing() -> None:
    lengths = (
        torch.rand(len(BANK), 1, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
        + 0.1
    )
    assert_same(voted(BANK * lengths, queries=3 * QUERIES), voted())
    renamed = torch.tensor([3, 0, 4, 1, 2])
    assert_same(
        voted(labels=renamed[LABELS]), {k: renamed[classes] for k, classes in voted().items()}
    )


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


def test_the_vote_of_a_large_number_of_classes_is_counted_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = voted()
    monkeypatch.setattr(voting, "_VOTE_BYTES", 8 * N_CLASSES * 7)
    assert_same(voted(), whole)
