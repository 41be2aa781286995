"""Small images of noise in train/CLASS and val/CLASS, so that training on them takes no time."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_noise(root: Path) -> Path:
    """64 images to train on and 16 held out, of two classes."""
    chance = np.random.default_rng(0)
    for place in range(80):
        folder = root / ("val" if place % 5 == 0 else "train") / "ab"[place % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(chance.integers(256, size=(64, 64, 3), dtype=np.uint8)).save(
            folder / f"{place}.png"
        )
    return root
