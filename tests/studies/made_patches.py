"""Images of several sizes, and their patches encoded by a small network."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from mixed_folder import picture
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from relloc.data.folder import FolderImages
from relloc.features.source import EncodeConfig
from relloc.models.alexnet import AlexNetBackbone
from relloc.models.small import SmallBackbone
from relloc.studies.patch_encoding import PATCH_LAYERS, EncodedPatches, PatchEncoder, encode_patches
from relloc.studies.patch_sets import RandomSquares, patch_keys

CPU = torch.device("cpu")
SIZES = ((70, 90), (64, 200), (20, 30), (123, 77), (90, 64))  # height, width; the third is small
BOXES = RandomSquares(n=3, sides_px=(24, 40, 64))


def encode_config(workers: int = 0, unreadable_share: float = 0.0) -> EncodeConfig:
    return EncodeConfig(
        batch=16,
        workers=workers,
        device=CPU,
        precision="fp32",
        unreadable_share=unreadable_share,
    )


def made_images(folder: Path) -> FolderImages:
    paths = []
    for number, (height, width) in enumerate(SIZES):
        paths.append(str(folder / f"{number}.png"))
        picture(height, width, seed=number).save(paths[-1])
    return FolderImages(name="made", split="train", paths=paths, labels=[], classes=())


def small_backbone() -> SmallBackbone:
    torch.manual_seed(0)
    return SmallBackbone(widths=(8, 8, 8, 10, 12)).eval()


def encoded(
    backbone: SmallBackbone | AlexNetBackbone,
    images: FolderImages,
    *,
    batch: int = 4,
    workers: int = 0,
    layers: Sequence[str] = PATCH_LAYERS,
    unreadable_share: float = 0.0,
) -> list[EncodedPatches]:
    encoder = PatchEncoder(
        backbone=backbone,
        layers=layers,
        patch_px=32,
        batch=batch,
        config=encode_config(workers, unreadable_share),
    )
    keys = patch_keys(range(len(images)), seed=7)
    return list(encode_patches(encoder, images, keys, BOXES, what="patches"))


def joined(batches: Sequence[EncodedPatches], layer: str) -> Tensor:
    return torch.cat([batch.features[layer] for batch in batches])


def plain_patch(image: Image.Image, box: Sequence[int], patch_px: int) -> Tensor:
    x1, y1, x2, y2 = box
    pixels = torch.from_numpy(np.array(image)[y1:y2, x1:x2].copy()).permute(2, 0, 1).float()
    size = (patch_px, patch_px)
    return interpolate(pixels[None], size, mode="bilinear", antialias=True)[0]
