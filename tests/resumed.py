"""A training that is killed and goes on, compared with one that was never stopped."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from relloc.results import Score


class Saved:
    """A state that keeps what was saved last, and counts how often it was saved and loaded.

    The save number `kill_after` is the last thing that the training does.
    """

    def __init__(
        self, content: dict[str, Any] | None = None, *, kill_after: int | None = None
    ) -> None:
        self.content = content
        self.kill_after = kill_after
        self.saves = 0
        self.loads = 0

    def load(self) -> dict[str, Any] | None:
        self.loads += 1
        return copy.deepcopy(self.content)

    def save(self, state: dict[str, Any]) -> None:
        self.content = copy.deepcopy(state)
        self.saves += 1
        if self.saves == self.kill_after:
            raise KeyboardInterrupt


def killed(run: Callable[[Saved], object], saves: int = 1) -> Saved:
    """Returns the state of a training that was killed after a number of saves."""
    state = Saved(kill_after=saves)
    with pytest.raises(KeyboardInterrupt):
        run(state)
    return state


def check_resumed(run: Callable[[Saved], list[Score]], *, first_save: int) -> list[Score]:
    """Compares scores and weights to the bit; returns the scores.

    `run` trains from what is saved in a state, which is saved after `first_save` steps first.
    """
    whole = Saved()
    expected = run(whole)
    first = killed(run).content
    assert first is not None
    assert first["step"] == first_save
    resumed = Saved(first)
    assert run(resumed) == expected
    assert whole.content is not None
    assert resumed.content is not None
    weights = whole.content["network"]
    assert weights
    for name, value in weights.items():
        assert torch.equal(value, resumed.content["network"][name]), name
    return expected
