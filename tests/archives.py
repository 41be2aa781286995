"""Archives that tests read: what was recorded, and real images."""

import os
import tarfile
from pathlib import Path

import pytest


def unpack(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        # Python 3.11.3 and older have no filters, and from 3.12 on one has to be chosen.
        tar.extraction_filter = getattr(tarfile, "data_filter", None)
        tar.extractall(folder)


def real_images_tar(name: str) -> Path:
    """Returns the tar NAME.tar of real images, or skips the test."""
    tars = os.environ.get("RELLOC_TEST_DATA")
    if not tars:
        pytest.skip("RELLOC_TEST_DATA does not name the folder of real images")
    return Path(tars) / f"{name}.tar"


def unpack_real_images(name: str, folder: Path) -> Path:
    """Unpacks a tar of real images, or skips the test; returns the folder NAME."""
    unpack(real_images_tar(name), folder)
    return folder / name
