"""Imagenette, ten classes of ImageNet that are easily distinguished: `data=imagenette`."""

from pathlib import Path
from typing import Literal

from torchvision.datasets import Imagenette

from relloc import checks
from relloc.data.folder import class_folders
from relloc.data.image_set import Splits
from relloc.errors import DataError, data_errors

# The folder in the archive of each size.
_FOLDERS = {"full": "imagenette2", "320px": "imagenette2-320", "160px": "imagenette2-160"}


def imagenette(
    *, root: str | None, size: Literal["full", "320px", "160px"], download: bool
) -> Splits:
    """Returns both splits of Imagenette, which lies in a folder below `root`.

    `size` is that of the images. With `download`, torchvision downloads them first if they are
    missing.

    Raises:
        DataError: `root` is not set, or the images are missing and not or not successfully
            downloaded.
    """
    # Without a root nothing says where a download should go.
    if not root:
        raise DataError(
            "data.root is not set: give data.root=FOLDER to keep Imagenette in, or set RELLOC_DATA"
        )
    checks.one_of("data.source.size", size, _FOLDERS)
    folder = Path(root) / _FOLDERS[size]
    if not folder.is_dir():
        if not download:
            raise DataError(f"{folder} is missing: set data.source.download=true to fetch it")
        problem = f"Imagenette could not be downloaded to {root}"
        with data_errors(problem, OSError, RuntimeError, advice="Try again, or put it there"):
            Imagenette(root, split="train", size=size, download=True)
    return class_folders(name="imagenette", root=str(folder), train="train", val="val")
