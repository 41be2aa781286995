"""Networks of the pretext task that are quick and known, and images to ask them about."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contexts import MadeContext, context
from PIL import Image
from torch import Tensor, nn

from relloc.data.folder import FolderImages
from relloc.data.image_set import Splits
from relloc.evaluation.contract import PretextModel
from relloc.geometry import PatchGrid, ShortSide
from relloc.models.pair_head import PairHead
from relloc.models.small import SmallBackbone
from relloc.patches.color import Keep
from relloc.patches.normalize import ByDataset
from relloc.patches.pipeline import PatchPipeline
from relloc.pretext.relative_location import RelativeLocation

GRID = PatchGrid(patch_px=8, gap_px=4, jitter_px=2, resize=ShortSide(px=40))
STILL = dataclasses.replace(GRID, jitter_px=0)


class Linear(nn.Module):
    """Logits that are random projections of the patches of a pair."""

    def __init__(self, patch_px: int = 8) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = torch.randn(2 * 3 * patch_px**2, 8, generator=generator)

    def forward(self, patches: Tensor) -> Tensor:
        rows = patches.flatten(2)
        neighbors = torch.cat([rows[:, :4], rows[:, 5:]], dim=1)
        centers = rows[:, 4:5].expand_as(neighbors)
        return torch.cat([neighbors, centers], dim=2) @ self.weights / 20


class Constant(nn.Module):
    """Always the same logits."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, patches: Tensor) -> Tensor:
        return self.logits.expand(len(patches), 8, 8)


class Certain(nn.Module):
    """Always right."""

    def forward(self, patches: Tensor) -> Tensor:
        return 20 * torch.eye(8).expand(len(patches), 8, 8)


def trained_network() -> RelativeLocation:
    torch.manual_seed(0)
    backbone = SmallBackbone(widths=(8, 8, 8, 10, 8))
    head = PairHead(
        embedding_dim=backbone.embedding_dim,
        hidden_dim=16,
        batch_norm_momentum=0.1,
        dropout=0.5,
        neck_std=0.5,
        head_std=0.5,
    )
    return RelativeLocation(backbone, head, batch_norm="joint", images_per_batch_norm=2)


def pretext(network: nn.Module, grid: PatchGrid = GRID, **changes: Any) -> PretextModel:
    patches = PatchPipeline(**{"grid": grid, "color": Keep(), "normalize": ByDataset()} | changes)
    return PretextModel(network=network.eval(), patches=patches, digest="made")


def image_files(
    folder: Path, n: int, *, split: str = "val", broken: tuple[int, ...] = (), **more: Any
) -> FolderImages:
    """Images of several sizes, each noise of its own brightness."""
    rng = np.random.default_rng(0)
    paths = []
    for index in range(n):
        pixels = rng.integers(1 + 200 * (index + 1) // n, size=(50 + index, 60, 3), dtype=np.uint8)
        path = folder / split / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
        if index in broken:
            path.write_bytes(b"no image")
        paths.append(str(path))
    settings = {"labels": [index % 2 for index in range(n)], "classes": ("cat", "a/dog")}
    return FolderImages(name="noise", split=split, paths=paths, **settings | more)


def asked_context(
    images: Any, model: PretextModel | None, folder: Path, **more: Any
) -> MadeContext:
    """What an evaluation gets: `images` are both splits unless `splits` is given."""
    made = context(
        pretext=model,
        splits=more.pop("splits", Splits(train=images, held_out=images)),
        folder=folder,
        **more,
    )
    config = dataclasses.replace(made.encode_config, unreadable_share=0.5)
    return dataclasses.replace(made, encode_config=config)
