"""Tests that the patches of an image are turned alike."""

import numpy as np
import torch

from relloc.patches.rotation import QuarterTurns


def test_patches_are_turned_as_numpy_does() -> None:
    generator = torch.Generator().manual_seed(0)
    patches = torch.rand(40, 9, 3, 5, 5, generator=generator)
    [turns] = QuarterTurns().draw(40, 9, 5, generator)
    turned = QuarterTurns()(patches, turns)
    counts = turns.bincount(minlength=4)
    assert counts.min() > 0
    for image, turn in enumerate(turns.tolist()):
        expected = np.rot90(patches[image].numpy(), k=turn, axes=(-2, -1))
        np.testing.assert_array_equal(turned[image].numpy(), expected)
