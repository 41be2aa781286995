"""Tests what is kept of features in memory, and how that is counted."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from relloc.errors import UsageError
from relloc.features.bank import Bank, bank_device, bank_gib, fill_bank, format_gib, free_gib
from relloc.features.source import FeatureBatch

CPU = torch.device("cpu")
DIMS = {"feature2": 12, "avgpool": 8}
LAYERS = tuple(DIMS)


@pytest.fixture
def source() -> Bank:
    """Seven images; a bank is a source as any other."""
    return Bank(
        features={layer: torch.randn(7, dim) for layer, dim in DIMS.items()},
        labels=torch.arange(7) % 3,
        n_classes=3,
        channels={"feature2": 3, "avgpool": 8},
    )


def test_a_bank_has_the_rows_of_its_source_in_the_order_asked_for(source: Bank) -> None:
    bank = fill_bank(source, LAYERS, 2, CPU, torch.tensor([5, 0, 6]))
    assert (bank.n, bank.n_classes, bank.dims, bank.channels) == (3, 3, DIMS, source.channels)
    assert all(
        torch.equal(bank.features[layer], source.features[layer][[5, 0, 6]]) for layer in LAYERS
    )
    assert bank.labels.tolist() == [2, 0, 0]


def test_bank_gib_is_the_memory_that_the_bank_takes(source: Bank) -> None:
    bank = fill_bank(source, LAYERS, 3, CPU)
    taken = sum(rows.untyped_storage().nbytes() for rows in bank.features.values())
    assert bank_gib(source, LAYERS) * 2**30 == pytest.approx(taken)
    imagenet = Bank(  # 1.28 million rows of 2048 numbers are 10.5 GB (protocols.md 3.7)
        features={"avgpool": torch.empty(1, 2048).expand(1_281_167, 2048)},
        labels=torch.zeros(1, dtype=torch.int64).expand(1_281_167),
        n_classes=1000,
        channels={"avgpool": 2048},
    )
    assert bank_gib(imagenet, ["avgpool"]) * 2**30 == pytest.approx(10.5e9, rel=0.01)


def test_a_bank_stays_on_the_cpu_where_the_cpu_computes() -> None:
    assert bank_device(0.001, CPU) == CPU


class Endless:
    """A source whose features nobody has the memory for; to ask for one is an error."""

    n, n_classes, channels, dims = (
        3,
        2,
        {"avgpool": 8},
        {"avgpool": 10**15},
    )  # 11 PiB: beyond any address

    def batches(self, *_: object) -> Iterator[FeatureBatch]:
        raise AssertionError("images are encoded before there is room for them")


def test_a_bank_larger_than_memory_is_refused_before_anything_is_encoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    message = r"features of 3 images at avgpool take \d+ GiB.* cpu .* GiB free.*fewer layers"
    with pytest.raises(UsageError, match=message):
        fill_bank(Endless(), ["avgpool"], 2, CPU)
    # Another process was faster.
    monkeypatch.setattr("relloc.features.bank.free_gib", lambda device: 1e12)
    with pytest.raises(UsageError, match=message):
        fill_bank(Endless(), ["avgpool"], 2, CPU)


def test_a_bank_fits_up_to_what_is_free(source: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = bank_gib(source, LAYERS)
    monkeypatch.setattr("relloc.features.bank.free_gib", lambda device: needed)
    assert fill_bank(source, LAYERS, 3, CPU).n == 7
    monkeypatch.setattr("relloc.features.bank.free_gib", lambda device: 0.99 * needed)
    with pytest.raises(UsageError, match="name fewer layers"):
        fill_bank(source, LAYERS, 3, CPU)
    part = torch.arange(6)  # of six images there is room
    assert fill_bank(source, LAYERS, 3, CPU, part).n == 6


@pytest.mark.skipif(
    not Path("/proc/meminfo").exists(), reason="what Linux calls available is compared"
)
def test_free_memory_is_what_linux_calls_available() -> None:
    (line,) = (
        line
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable:")
    )
    assert free_gib(CPU) == pytest.approx(int(line.split()[1]) / 2**20, rel=0.2)
    assert 0 < free_gib(CPU) < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


@pytest.mark.parametrize(
    ("gib", "words"),
    [(0.00123456, "0.00123 GiB"), (9.7744, "9.77 GiB"), (210.49, "210 GiB"), (1234, "1234 GiB")],
)
def test_little_memory_keeps_its_digits(gib: float, words: str) -> None:
    assert format_gib(gib) == words
