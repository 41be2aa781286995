"""`data=imagenette`: ten easily told ImageNet classes, downloaded by torchvision."""

from pathlib import Path
from typing import Literal

from torchvision.datasets import Imagenette

from relloc import checks
from relloc.data.folder import class_folders
from relloc.data.image_set import Splits
from relloc.errors import DataError, data_errors

_FOLDERS = {"full": "imagenette2", "320px": "imagenette2-320", "160px": "imagenette2-160"}


def imagenette(
    *, root: str | None, size: Literal["full", "320px", "160px"], download: bool
) -> Splits:
    """Both splits of Imagenette below `root`; fetched there first if missing and `download` is on.

    Raises:
        DataError: no root, or the images are neither there nor to be downloaded.
    """
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
