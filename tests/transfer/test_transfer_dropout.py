"""Dropout that draws by the seed of a sample."""

import pytest
import torch
from torch import Tensor

from relloc.transfer.dropout import SampleDropout, dropout_seeds

CPU = torch.device("cpu")


def drawn(p: float, seeds: list[int], *shape: int, layer: int = 0, whole: bool = False) -> Tensor:
    dropout = SampleDropout(p, layer, whole_channels=whole)
    return dropout(torch.ones(len(seeds), *shape), dropout_seeds(seeds, CPU))


def test_values_are_kept_with_their_probability_and_scaled() -> None:
    for p in (0.1, 0.5, 0.9):
        values = drawn(p, list(range(20)), 10_000)
        assert values.unique().tolist() == pytest.approx([0, 1 / (1 - p)])
        # Of 200,000 values the share is within four standard deviations, here and in each sample.
        assert float((values == 0).float().mean()) == pytest.approx(p, abs=0.005)
        by_sample = (values == 0).float().mean(dim=1)
        torch.testing.assert_close(by_sample, torch.full((20,), p), rtol=0, atol=0.02)


def test_draws_do_not_depend_on_the_rest_of_the_batch() -> None:
    together = drawn(0.5, [3, 4, 5], 7, 4, 6)
    assert torch.equal(drawn(0.5, [5], 7, 4, 6)[0], together[2])
    assert torch.equal(drawn(0.5, [5, 3], 7, 4, 6), together[[2, 0]])


def test_samples_layers_and_neighboring_values_draw_on_their_own() -> None:
    first, other = drawn(0.5, [1, 2], 20_000)
    (layer,) = drawn(0.5, [1], 20_000, layer=1)
    pairs = [(first, other), (first, layer), (first[1:], first[:-1]), (first[256:], first[:-256])]
    for one, two in pairs:
        # 20,000 independent fair pairs agree in half of the cases, within 0.0035 (a deviation).
        assert float((one == two).float().mean()) == pytest.approx(0.5, abs=0.015)


def test_whole_channels_are_dropped_together() -> None:
    values = drawn(0.5, list(range(8)), 64, 5, 6, whole=True)
    by_channel = values.flatten(2)
    assert torch.equal(by_channel.amin(dim=2), by_channel.amax(dim=2))
    assert 0.4 < float((by_channel[:, :, 0] == 0).float().mean()) < 0.6


def test_tests_drop_nothing_and_trainings_without_seeds_are_refused() -> None:
    values = torch.randn(2, 5)
    dropout = SampleDropout(0.5, 0)
    with pytest.raises(ValueError, match="seed"):
        dropout(values)
    assert torch.equal(dropout.eval()(values), values)
    assert torch.equal(SampleDropout(0.0, 0)(values), values)
    assert drawn(0.5, [], 7).shape == (0, 7)


@pytest.mark.parametrize(("p", "layer"), [(1.0, 0), (-0.1, 0), (0.5, -1), (0.5, 128)])
def test_wrong_probabilities_and_numbers_are_refused(p: float, layer: int) -> None:
    with pytest.raises(ValueError, match="dropout of"):
        SampleDropout(p, layer)


def test_in_bfloat16_the_scale_is_not_rounded_first() -> None:
    values = torch.full((1, 1000), 3.0, dtype=torch.bfloat16)
    found = SampleDropout(0.1, 0)(values, dropout_seeds([0], CPU))
    assert found.dtype == torch.bfloat16
    assert found.max() == torch.tensor(3 / 0.9).bfloat16()
