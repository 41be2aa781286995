"""The choice of anchors and regions: numbers, fairness, and what it must not depend on."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from relloc.transfer.detection.sampling import choose, priorities


def test_priorities_are_different_and_depend_on_seed_and_id_alone() -> None:
    ids = torch.arange(5000)
    both = priorities([3, 4], ids)
    assert both.min() >= 0
    assert len(both[0].unique()) == 5000
    assert torch.equal(priorities([4], ids.flip(0))[0], both[1].flip(0))
    # Orders of two seeds are unrelated, also of neighboring seeds and of seeds that differ in their
    # upper half alone.
    far = priorities([3 + (1 << 40)], ids)[0]
    for other in (both[1], far):
        ranks = torch.stack([both[0].argsort().argsort(), other.argsort().argsort()]).double()
        assert abs(torch.corrcoef(ranks)[0, 1]) < 0.06
    assert priorities([], ids).shape == (0, 5000)


def test_every_bit_of_an_id_changes_half_of_the_bits_of_its_priority() -> None:
    ids = torch.arange(0, 1 << 30, (1 << 20) + 1)
    base = priorities([12345], ids)[0] >> 32
    for bit in range(31):
        flipped = priorities([12345], ids ^ (1 << bit))[0] >> 32
        changed = base ^ flipped
        for place in range(31):
            share = ((changed >> place) & 1).double().mean()
            assert 0.3 < share < 0.7, (bit, place)


flags = st.lists(st.sampled_from(["positive", "negative", "neither"]), max_size=30)


@given(flags, st.integers(1, 20), st.sampled_from([0.25, 0.5]), st.integers(0, 2**63 - 1))
def test_the_candidates_of_smallest_priority_are_chosen(
    kinds: list[str], number: int, share: float, seed: int
) -> None:
    ids = 7 * torch.arange(len(kinds))
    priority = priorities([seed], ids)
    positive = torch.tensor([[kind == "positive" for kind in kinds]], dtype=torch.bool)
    negative = torch.tensor([[kind == "negative" for kind in kinds]], dtype=torch.bool)
    chosen = choose(positive, negative, priority, number=number, positive_share=share)

    def expected(kind: str, limit: int) -> set[int]:
        places = [place for place, other in enumerate(kinds) if other == kind]
        places.sort(key=lambda place: int(priority[0, place]))
        return set(places[:limit])

    positive_places = expected("positive", int(number * share))
    negative_places = expected("negative", number - len(positive_places))
    assert set(chosen[0][0].nonzero().flatten().tolist()) == positive_places
    assert set(chosen[1][0].nonzero().flatten().tolist()) == negative_places


def test_the_numbers_of_an_image_are_those_of_the_protocol() -> None:
    n = 3000
    positive = torch.zeros(4, n, dtype=torch.bool)
    positive[0, :500] = True  # more than half of 256
    positive[1, :20] = True
    negative = ~positive
    negative[3] = False
    negative[3, 100:140] = True
    priority = priorities([1, 2, 3, 4], torch.arange(n))
    chosen = choose(positive, negative, priority, number=256, positive_share=0.5)
    assert chosen[0].sum(dim=1).tolist() == [128, 20, 0, 0]
    assert chosen[1].sum(dim=1).tolist() == [128, 236, 256, 40]
    assert not (chosen[0] & ~positive).any()
    assert not (chosen[1] & ~negative).any()


def test_every_candidate_is_chosen_equally_often() -> None:
    n_seeds, n = 4000, 40
    seeds = [(seed * 0x9E3779B97F4A7C15) % 2**63 for seed in range(n_seeds)]
    everything = torch.ones(n_seeds, n, dtype=torch.bool)
    chosen, _ = choose(
        everything,
        ~everything,
        priorities(seeds, torch.arange(n)),
        number=16,
        positive_share=0.5,
    )
    frequency = chosen.double().mean(dim=0)
    # Five standard deviations of a share of 1/5 in 4,000 draws.
    assert (frequency - 8 / 40).abs().max() < 5 * (0.2 * 0.8 / n_seeds) ** 0.5
    # Nor do pairs of candidates come together more often.
    pairs = chosen.double().T @ chosen.double() / n_seeds
    off_diagonal = pairs[~torch.eye(n, dtype=torch.bool)]
    assert (off_diagonal - 8 * 7 / (40 * 39)).abs().max() < 0.02
