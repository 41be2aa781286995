"""A training that is killed and goes on, compared with one that was never stopped."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from relloc.results import Score


class Saved:
    """A state that keeps what was saved, and ends the process after one save if it is to."""

    def __init__(self, state: Any = None, *, kill: bool = False) -> None:
        self.state = state
        self.kill = kill

    def load(self) -> dict[str, Any] | None:
        return self.state

    def save(self, state: dict[str, Any]) -> None:
        self.state = copy.deepcopy(state)
        if self.kill:
            raise KeyboardInterrupt


def check_resumed(run: Callable[[Saved], list[Score]], *, first_save: int) -> list[Score]:
    """Compares scores and weights to the bit; returns the scores.

    `run` trains from what is saved in a state, which is saved after `first_save` steps first.
    """
    whole = Saved()
    expected = run(whole)
    killed = Saved(kill=True)
    with pytest.raises(KeyboardInterrupt):
        run(killed)
    assert killed.state["step"] == first_save
    resumed = Saved(killed.state)
    assert run(resumed) == expected
    weights = whole.state["network"]
    assert weights
    for name, value in weights.items():
        assert torch.equal(value, resumed.state["network"][name]), name
    return expected
