"""A SLURM of two pretended nodes on this machine, started once for all tests of this folder."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "launchers" / "one_machine"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("slurm")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which SLURM's clients find it. Without accounting (sacct), which none may need."""
    if shutil.which("slurmctld") is None:
        pytest.skip("SLURM is not installed: launchers/one_machine/install.sh does that on Debian")
    folder = tmp_path_factory.mktemp("cluster") / "slurm"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("RELLOC_", "MLFLOW_", "SLURM"))},
        "RELLOC_SLURM_DIR": str(folder),
        "RELLOC_SLURM_ACCT": "0",
        "SLURM_CONF": str(folder / "slurm.conf"),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "160",
    }
    subprocess.run([SCRIPTS / "up.sh"], env=environment, check=True, timeout=120)
    yield environment
    subprocess.run([SCRIPTS / "down.sh"], env=environment, check=True, timeout=120)
