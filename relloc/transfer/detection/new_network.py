"""What networks of detectors begin with: the stages of a backbone, and new weights."""

import copy

import torch
from torch import nn

from relloc.models.backbone import Backbone
from relloc.seeds import Use, seed_for


def copied_stages(backbone: Backbone) -> list[nn.Module]:
    """Returns copies of the stages, with their weights: the evaluated backbone keeps its own."""
    return list(copy.deepcopy(backbone).stages().values())


def weights_generator(seed: int) -> torch.Generator:
    """Returns the generator of a detector's initial weights.

    It is none of PyTorch's own, so that weights depend on the seed, and not on what was drawn
    before.
    """
    return torch.Generator().manual_seed(seed_for(Use.DETECTOR_WEIGHTS, seed))
