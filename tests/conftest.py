"""All of relloc is imported with the shapes in its annotations checked at run time."""

import signal
from pathlib import Path

import pytest
import torch
from archives import unpack_real_images
from hypothesis import settings
from jaxtyping import install_import_hook

install_import_hook("relloc", "checked.check")
settings.register_profile("shared machines", deadline=None)  # a first example may import MLflow
settings.load_profile("shared machines")
signal.signal(
    signal.SIGHUP, signal.SIG_DFL
)  # under nohup it is ignored, and so it would be by all that tests start
torch.set_num_threads(1)  # networks this small spend their time waiting for a second one


# Files are handed out to processes in this order. What takes minutes is first, so that none goes on
# alone at the end.
LONG = (
    "slurm/test_sweeps_on_slurm",
    "transfer/test_transfer_eight_images",
    "flow",
    "launchers",
    "tracking/test_browser",
    "tracking/test_server",
    "transfer/test_transfer_compiled",
    "analysis",
)


SLOW = ("browser", "postgres", "slurm")  # markers of tests that start a server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_place)
    for item in items:
        if any(item.get_closest_marker(name) for name in SLOW):
            item.add_marker("slow")
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def _place(item: pytest.Item) -> int:
    path = item.path.relative_to(Path(__file__).parent).as_posix()
    return next((place for place, start in enumerate(LONG) if path.startswith(start)), len(LONG))


@pytest.fixture(scope="session")
def real_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with imagenette_small/ and demo_photos/; for tests that are marked `data`."""
    folder = tmp_path_factory.mktemp("real_images")
    for name in ("imagenette_small", "demo_photos"):
        unpack_real_images(name, folder)
    return folder
