"""All of relloc is imported with the shapes in its annotations checked at run time."""

import os
import tarfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

install_import_hook("relloc", "checked.check")
settings.register_profile("shared machines", deadline=None)  # a first example may import MLflow
settings.load_profile("shared machines")
torch.set_num_threads(1)  # networks this small spend their time waiting for a second one


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def real_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with imagenette_small/ and demo_photos/; for tests that are marked `data`."""
    tars = os.environ.get("RELLOC_TEST_DATA")
    if not tars:
        pytest.skip("RELLOC_TEST_DATA does not name the folder of real images")
    folder = tmp_path_factory.mktemp("real_images")
    for name in ("imagenette_small", "demo_photos"):
        with tarfile.open(Path(tars) / f"{name}.tar") as tar:
            tar.extractall(folder, filter="data")
    return folder
