"""A labeled folder with every kind of file that packing treats in its own way."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

ORIENTATION = 0x0112
BROKEN = ("train/b/broken.jpg", "train/b/empty.png")
KEPT = ("train/a/gray.jpg", "train/a/small.jpg")
REDUCED = ("train/a/large.jpg", "train/b/large turned.jpg", "train/b/large.png")
ENCODED = ("train/b/cmyk.jpg", "train/b/small.png", "train/b/turned.jpg")


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Something with edges and shades, as photographs have."""
    coarse = np.random.default_rng(seed).integers(
        0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8
    )
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", **options)
    return stream.getvalue()


def write_mixed(root: Path) -> Path:
    """ROOT/{train,val}/{a,b}; train/ has the kinds of files above for a packed short side of 96."""
    turned = Image.Exif()
    turned[ORIENTATION] = 6
    files = {
        "train/a/gray.jpg": jpeg(picture(80, 90).convert("L")),
        "train/a/large.jpg": jpeg(picture(200, 130, seed=1), quality=97, comment=b"a comment"),
        "train/a/small.jpg": jpeg(picture(96, 120, seed=2), subsampling="4:4:4", progressive=True),
        "train/b/broken.jpg": jpeg(picture(90, 90, seed=3))[:900],
        "train/b/cmyk.jpg": jpeg(picture(70, 90, seed=4).convert("CMYK")),
        "train/b/empty.png": b"",
        "train/b/large turned.jpg": jpeg(picture(120, 250, seed=5), exif=turned),
        "train/b/turned.jpg": jpeg(picture(64, 90, seed=6), exif=turned),
        "val/a/1.jpg": jpeg(picture(90, 100, seed=7)),
        "val/a/2.jpg": jpeg(picture(90, 100, seed=8)),
        "val/b/3.jpg": jpeg(picture(90, 100, seed=9)),
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    picture(70, 80, seed=10).save(root / "train/b/small.png")
    picture(150, 310, seed=11).save(root / "train/b/large.png")
    return root


def write_many(root: Path, n_train: int, n_val: int, *, height: int = 96, width: int = 120) -> Path:
    """ROOT/{train,val}/{a,b} of JPEGs of one size."""
    for split, n in (("train", n_train), ("val", n_val)):
        for number in range(n):
            path = root / split / "ab"[number % 2] / f"{number:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(
                jpeg(picture(height, width, seed=number + 1000 * (split == "val")), quality=85)
            )
    return root
