"""up.sh and down.sh: a SLURM that is there as a whole, or not at all."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from one_machine import SCRIPTS, environment_of, left_of


def run(environment: Mapping[str, str], *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_with_accounting_sacct_knows_a_job_and_nothing_stays_after_down(tmp_path: Path) -> None:
    environment = environment_of(tmp_path / "slurm", accounting=True)
    up = run(environment, SCRIPTS / "up.sh")
    try:
        assert (up.returncode, up.stdout) == (
            0,
            f"export SLURM_CONF={tmp_path / 'slurm/slurm.conf'}\n",
        ), up.stderr
        assert (
            sum("slurm" in words for words in left_of(tmp_path / "slurm")) > 5
        )  # so what is looked for can be seen
        assert (
            run(environment, "srun", "--immediate=120", "--job-name=a_job", "true").returncode == 0
        )
        end = time.monotonic() + 120
        while (
            "a_job|COMPLETED"
            not in (told := run(environment, "sacct", "-nXP", "-o", "JobName,State")).stdout
        ):
            assert time.monotonic() < end, told
            time.sleep(0.2)
    finally:
        down = run(environment, SCRIPTS / "down.sh")
    assert (down.returncode, down.stdout, down.stderr) == (0, "", "")
    assert left_of(tmp_path / "slurm") == []


def test_a_job_that_nobody_can_cancel_ends_with_the_cluster(tmp_path: Path) -> None:
    environment = environment_of(tmp_path / "slurm", accounting=False)
    assert run(environment, SCRIPTS / "up.sh").returncode == 0
    try:
        assert (
            run(
                environment, "sbatch", f"--output={tmp_path}/told", "--wrap=echo begun; sleep 600"
            ).returncode
            == 0
        )
        end = time.monotonic() + 120
        while not (tmp_path / "told").exists() or "begun" not in (tmp_path / "told").read_text():
            assert time.monotonic() < end
            time.sleep(0.1)
        os.kill(int((tmp_path / "slurm/slurmctld.pid").read_text()), signal.SIGKILL)
    finally:
        run(environment, SCRIPTS / "down.sh")
    assert left_of(tmp_path / "slurm") == []


@pytest.mark.parametrize(
    ("culprit", "says"),
    [("slurmctld", "library is missing"), ("slurmd-n2", "Address already in use")],
)
def test_what_fails_on_the_way_leaves_nothing_and_names_the_log_that_says_why(
    tmp_path: Path, culprit: str, says: str
) -> None:
    environment = environment_of(tmp_path / "slurm", accounting=False)
    if culprit == "slurmctld":
        program = tmp_path / culprit
        program.write_text(f"#!/bin/sh\necho {says} >&2; exit 3\n")
        program.chmod(0o755)
        up = run(
            environment | {"PATH": f"{tmp_path}{os.pathsep}{environment['PATH']}"},
            SCRIPTS / "up.sh",
        )
    else:
        with socket.create_server(("", int(environment["RELLOC_SLURM_PORT"]) + 11)):
            up = run(environment, SCRIPTS / "up.sh")
    assert (up.returncode, up.stdout) == (1, "")
    assert up.stderr.startswith(f"up.sh: {culprit} did not start")
    (log,) = (
        word for word in up.stderr.split() if word.startswith(f"{tmp_path}/slurm-failed/{culprit}.")
    )
    assert says in Path(log).read_text()
    assert says in up.stderr
    assert left_of(tmp_path / "slurm") == []


def test_down_ends_no_process_of_others_that_has_a_noted_number(tmp_path: Path) -> None:
    folder = tmp_path / "slurm"
    folder.mkdir()
    environment = {**os.environ, "RELLOC_SLURM_DIR": str(folder)}
    with (
        subprocess.Popen(["sleep", "600"]) as other,
        subprocess.Popen(
            ["sleep", "600"], env={**os.environ, "SLURM_CONF": f"{folder}/slurm.conf"}
        ) as ours,
    ):
        try:
            (folder / "pids").write_text(f"{other.pid}\n{ours.pid}\n")
            assert run(environment, SCRIPTS / "down.sh").returncode == 0
            assert ours.wait(60) == -signal.SIGTERM
            assert other.poll() is None
        finally:
            other.kill()
            ours.kill()
    assert not folder.exists()


def test_one_that_is_up_is_not_started_over(tmp_path: Path) -> None:
    environment = environment_of(tmp_path / "slurm", accounting=False)
    (tmp_path / "slurm").mkdir()
    up = run(environment, SCRIPTS / "up.sh")
    assert (up.returncode, up.stderr.count("\n")) == (1, 1)
    assert f"{tmp_path / 'slurm'} exists" in up.stderr
    assert (tmp_path / "slurm").is_dir()
