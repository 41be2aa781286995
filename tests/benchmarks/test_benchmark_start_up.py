"""benchmarks/start_up.py finds when an evaluation has encoded its first batch."""

import time

import pytest
import start_up

pytestmark = pytest.mark.slow


def test_the_first_batch_of_an_evaluation_is_noticed() -> None:
    started = time.monotonic()
    words = ("model=small", "eval=knn", "data=photos", "workers=0", "device=cpu")
    first_batch_s, processor_s = start_up._first_batch_s(words, {})
    assert 0 < first_batch_s < time.monotonic() - started
    assert processor_s > 0
