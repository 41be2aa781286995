"""Commands run as elsewhere where /dev/shm has Docker's 64 MB or less, or where TMPDIR is full."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from noise_folder import write_noise
from tiny import TINY

from relloc.checkpoints.backbone_files import BACKBONE_FILE
from relloc.results import read_results

_FULL = "mount -t tmpfs -o size=64k tmpfs {0} && head -c 100000 /dev/zero > {0}/full 2> /dev/null; "
PLACES = {
    "64 MB of shared memory": "mount -t tmpfs -o size=64m tmpfs /dev/shm && ",
    "neither shared memory nor temporary files": (
        _FULL.format("/dev/shm") + _FULL.format("full") + "export TMPDIR=$PWD/full; "
    ),
}


def _may_mount() -> bool:
    unshare = shutil.which("unshare")
    tried = [unshare or "", "-m", "sh", "-c", "mount -t tmpfs -o size=64m tmpfs /dev/shm"]
    return (
        unshare is not None
        and subprocess.run(tried, capture_output=True, check=False).returncode == 0
    )


pytestmark = pytest.mark.skipif(not _may_mount(), reason="needs the right to mount")


def run(place: str, folder: Path, module: str, *words: str) -> str:
    """What the command printed, which has ended well."""
    (folder / "full").mkdir(exist_ok=True)
    line = [
        "unshare",
        "-m",
        "sh",
        "-c",
        PLACES[place] + 'exec "$@"',
        "sh",
        sys.executable,
        "-m",
        module,
        *words,
    ]
    done = subprocess.run(
        line,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout
    assert "Traceback" not in done.stdout
    return done.stdout


@pytest.mark.parametrize("place", PLACES)
def test_training_and_evaluation_need_no_shared_memory_and_no_temporary_files(
    tmp_path: Path, place: str
) -> None:
    root = write_noise(tmp_path / "images")
    images = ["data=folder", f"data.root={root}", "device=cpu", "workers=4", "tracking=none"]
    # Crops of 480 px: eight batches of 11 MB are read ahead
    size = ["grid.patch_px=96", "grid.gap_px=96", "grid.jitter_px=0", "grid.resize.px=700"]
    tiny = [
        word for word in TINY if not word.startswith(("data.source", "grid.", "view.", "schedule."))
    ]
    short = ["recipe.images_per_batch_norm=16", "recipe.images_per_step=16", "schedule.epochs=1"]
    # Views of 664 px: 21 MB a batch
    views = [
        "view.short_px=700",
        "view.crop_px=664",
        "view.batch=16",
        "eval=[knn]",
        "eval.knn.k=[1]",
    ]
    out = tmp_path / "trained"
    run(
        place,
        tmp_path,
        "relloc.train",
        *tiny,
        *images,
        *size,
        *short,
        *views,
        f"hydra.run.dir={out}",
    )
    assert {row.checkpoint for row in read_results(out) if row.eval == "knn"} == {
        "random",
        str(out / BACKBONE_FILE),
    }
