"""What is answered without torch and MLflow, which take seconds to import."""

import subprocess
import sys


def test_a_config_is_shown_without_torch_or_mlflow(tmp_path) -> None:
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "relloc.train",
        "--cfg",
        "job",
        "grid.gap_px=33",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=True, cwd=tmp_path
    )
    assert "gap_px: 33" in done.stdout
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "hydra" in loaded
    assert not loaded & {"torch", "torchvision", "mlflow", "matplotlib"}
    assert list(tmp_path.iterdir()) == []
