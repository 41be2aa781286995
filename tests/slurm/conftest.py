"""A SLURM of two pretended nodes on this machine, started once for all tests of this folder."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from one_machine import SCRIPTS, environment_of


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("slurm")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which SLURM's clients find it. No test may need accounting (sacct)."""
    environment = environment_of(tmp_path_factory.mktemp("cluster") / "slurm", accounting=False)
    environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    subprocess.run([SCRIPTS / "up.sh"], env=environment, check=True, timeout=300)
    yield environment
    subprocess.run([SCRIPTS / "down.sh"], env=environment, check=True, timeout=300)
