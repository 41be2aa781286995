"""`data=imagenette`: ten easily told ImageNet classes, downloaded by torchvision."""

from pathlib import Path
from typing import Literal

from torchvision.datasets import Imagenette

from relloc.data.folder import class_folders
from relloc.data.image_set import Splits
from relloc.errors import DataError

_FOLDERS = {"full": "imagenette2", "320px": "imagenette2-320", "160px": "imagenette2-160"}


def imagenette(*, root: str | None, size: Literal["full", "320px", "160px"], download: bool) -> Splits:
    """Both splits of Imagenette below `root`; fetched there first if missing and `download` is on.

    Raises:
        DataError: no root, or the images are neither there nor to be downloaded.
    """
    if not root:
        raise DataError("data.root is not set: give data.root=FOLDER to keep Imagenette in, or set RELLOC_DATA")
    if size not in _FOLDERS:
        raise DataError(f"data.source.size is {size!r}, not one of {', '.join(_FOLDERS)}")
    folder = Path(root) / _FOLDERS[size]
    if not folder.is_dir():
        if not download:
            raise DataError(f"{folder} is missing: set data.source.download=true to fetch it")
        try:
            Imagenette(root, split="train", size=size, download=True)
        except (OSError, RuntimeError) as error:
            raise DataError(f"Imagenette could not be downloaded to {root}: {error}") from error
    return class_folders(name="imagenette", root=str(folder), train="train", val="val")
