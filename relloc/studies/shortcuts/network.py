"""A small network that is trained to tell from a patch where in its image it lay.

The paper trained a network for this (docs/protocols.md 3.12). Its settings are not published; those
here are our own.
"""

import collections
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from relloc.models.small import SmallBackbone
from relloc.patches.pipeline import Color, Normalize
from relloc.seeds import Use, seed_for
from relloc.studies.shortcuts.position import (
    Errors,
    color_seeds,
    errors_of,
    positions_of,
    treated_patches,
)
from relloc.studies.shortcuts.reading import StudiedImage

_WIDTHS = (32, 64, 128, 256, 256)
_RATE = 1e-3
_WEIGHT_DECAY = 1e-2
_BATCH = 256  # patches a step
_COORDINATES = 2


class PatchNetwork(nn.Module):
    """A small residual network with a linear layer: a patch (n 3 p p) to a position (n 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = SmallBackbone(widths=_WIDTHS)
        self.position = nn.Linear(self.backbone.embedding_dim, _COORDINATES)

    def forward(self, patches: Float[Tensor, "n 3 p p"]) -> Float[Tensor, "n 2"]:
        return self.position(self.backbone.embed(patches))


class NetworkPositions:
    """Trains a `PatchNetwork` for each color treatment, on all patches of the training images.

    The patches are kept in memory as bytes: 12 KB each of 64 px. Colors are drawn anew each epoch.
    """

    def __init__(
        self,
        colors: Mapping[str, Color],
        normalize: Normalize,
        *,
        epochs: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self._colors = colors
        self._normalize = normalize
        self._epochs = epochs
        self._seed = seed
        self._device = device
        self._patches: list[UInt8[np.ndarray, "m p p 3"]] = []
        self._positions: list[Tensor] = []
        self._networks: dict[str, PatchNetwork] = {}
        self._errors: dict[str, list[Tensor]] = collections.defaultdict(list)
        self._centers: list[Tensor] = []

    def learn(self, images: Sequence[StudiedImage]) -> None:
        """Keeps the patches of training images."""
        for image in images:
            self._patches.append(image.patches)
        self._positions.append(positions_of(images, self._device).flatten(0, 1))

    def finish(self) -> None:
        """Trains the networks, and then forgets the patches."""
        patches = torch.from_numpy(np.concatenate(self._patches))
        positions = torch.cat(self._positions)
        for color in self._colors:
            self._networks[color] = self._train(patches, positions, color)
        self._patches.clear()
        self._positions.clear()

    @torch.no_grad()
    def test(self, images: Sequence[StudiedImage]) -> None:
        """Measures the errors on images that were not learned."""
        positions = positions_of(images, self._device)
        self._centers.append(positions.square().sum(dim=-1).cpu())
        seeds = color_seeds(images, seed=self._seed, split=1)
        for color, network in self._networks.items():
            patches = treated_patches(
                images, self._colors[color], self._normalize, seeds=seeds, device=self._device
            )
            predicted = network(patches.flatten(0, 1)).view_as(positions)
            error = (predicted - positions).square().sum(dim=-1)
            self._errors[color].append(error.cpu())

    def errors(self) -> dict[str, Errors]:
        """Returns the errors by color treatment."""
        centers = torch.cat(self._centers)
        found = {}
        for color, parts in self._errors.items():
            # Nothing is chosen among networks, so that nothing was held back.
            found[color] = errors_of(torch.cat(parts), centers, math.nan)
        return found

    def _train(
        self,
        patches: UInt8[Tensor, "n p p 3"],
        positions: Float[Tensor, "n 2"],
        color: str,
    ) -> PatchNetwork:
        # The caller's random numbers stay as they are.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(Use.SHORTCUT_NETWORK, self._seed))
            network = PatchNetwork()
        network.to(self._device).train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=_RATE, weight_decay=_WEIGHT_DECAY)
        steps = self._epochs * math.ceil(len(patches) / _BATCH)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for epoch in range(self._epochs):
            seed = seed_for(Use.SHORTCUT_NETWORK, self._seed, epoch)
            order = torch.randperm(len(patches), generator=torch.Generator().manual_seed(seed))
            color_generator = torch.Generator(self._device).manual_seed(seed)
            for indices in order.split(_BATCH):
                made = self._made(patches[indices], color, color_generator)
                predicted = network(made)
                loss = mse_loss(predicted, positions[indices.to(self._device)])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
        return network.eval()

    def _made(
        self, pixels: UInt8[Tensor, "n p p 3"], color: str, generator: torch.Generator
    ) -> Float[Tensor, "n 3 p p"]:
        treatment = self._colors[color]
        on_device = pixels.to(self._device, non_blocking=True).permute(0, 3, 1, 2).float()
        # A treatment takes the patches of an image side by side; here each stands for itself.
        of_images = on_device.contiguous().unsqueeze(1)
        drawn = treatment.draw(len(of_images), 1, of_images.shape[-1], generator)
        return self._normalize(treatment(of_images, *drawn)).flatten(0, 1)
