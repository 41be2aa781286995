from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from relloc.data.folder import FolderImages
from relloc.data.samples import read_samples
from relloc.errors import UnreadableImage

IMAGES = FolderImages(
    name="made", split="train", paths=[f"{index}.jpg" for index in range(9)], labels=[], classes=()
)
BATCHES = [[(0, 5), (1, 6)], [(4, 7)], [], [(3, 8), (2, 9)]]


def make(index: int, seed: int) -> dict[str, Any]:
    """A sample whose size depends on the image, as boxes of detectors do."""
    if index == 3:
        raise UnreadableImage("it is broken")
    return {"seed": seed, "pixels": np.full((index + 1, 2, 3), index, dtype=np.uint8)}


def read(workers: int, batches: Sequence[list[tuple[int, int]]] = BATCHES) -> list[Any]:
    return list(read_samples(IMAGES, make, iter(batches), workers=workers))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_samples_of_any_size_come_in_order_and_broken_ones_are_named(workers: int) -> None:
    found = read(workers)
    assert [[sample["seed"] for sample in batch.samples] for batch in found] == [
        [5, 6],
        [7],
        [],
        [9],
    ]
    assert [sample["pixels"].shape for sample in found[0].samples] == [(1, 2, 3), (2, 2, 3)]
    assert (found[1].samples[0]["pixels"] == 4).all()
    assert [batch.unreadable for batch in found] == [{}, {}, {}, {"3.jpg": "it is broken"}]


def test_no_batches_give_none() -> None:
    assert read(2, []) == []


def test_large_arrays_of_a_sample_are_those_that_were_made_and_can_be_written() -> None:
    def make_large(index: int, seed: int) -> list[np.ndarray]:
        rng = np.random.default_rng(seed)
        pixels = rng.integers(256, size=(123, 457, 3), dtype=np.uint8)
        # Neither contiguous in memory nor of whole bytes, nor small, nor of any element.
        return [pixels, pixels[:, ::-1], pixels[..., 0] > 99, pixels[:0], rng.random((99, 101))]

    batches = [[(0, 5), (1, 6)], [(2, 7)]]
    found = list(read_samples(IMAGES, make_large, batches, workers=2))
    for batch, keys in zip(found, batches, strict=True):
        for sample, (index, seed) in zip(batch.samples, keys, strict=True):
            for array, expected in zip(sample, make_large(index, seed), strict=True):
                assert array.dtype == expected.dtype
                np.testing.assert_array_equal(array, expected)
                array[...] = 0  # torch shares memory that can be written to
