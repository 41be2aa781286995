"""From points to jobs: what is noted when, and what a refusal leaves. SLURM is scripts of tests."""

import json
import math
import os
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from hydra_plugins.relloc_launchers import slurm
from hydra_plugins.relloc_launchers.points import CONFIG_FILE, to_run
from hydra_plugins.relloc_launchers.slurm import SlurmLauncher, log_of
from omegaconf import OmegaConf

from relloc.errors import UsageError
from relloc.runs.settings import conf_dir
from relloc.status import Status
from relloc.sweeps.point_status import Scheduler, schedulers
from relloc.sweeps.points import Point, note_job, read_job
from relloc.sweeps.sweep import Sweep

Makes = Callable[..., SlurmLauncher]


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("srun", "squeue"):
        write(folder, name, "exit 0")
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")
    monkeypatch.chdir(tmp_path)
    return folder


def write(commands: Path, name: str, does: str) -> None:
    (commands / name).write_text(f"#!/bin/sh\n{does}\n")
    (commands / name).chmod(0o755)


@pytest.fixture
def launcher(tmp_path: Path) -> Makes:
    def make(**changed: Any) -> SlurmLauncher:
        settings = OmegaConf.load(conf_dir() / "launcher/slurm.yaml").launcher
        made = SlurmLauncher(OmegaConf.merge(settings, changed))  # type: ignore[arg-type]
        made.sweep, made.code = Sweep(tmp_path / "runs/sweeps/s"), tmp_path
        made.sweep.folder.mkdir(parents=True, exist_ok=True)
        return made

    return make


def points(folder: Path, number: int) -> list[Point]:
    return [
        Point(
            kind="train",
            name=f"seed={seed}",
            overrides=(),
            identity=f"i{seed}",
            folder=folder / f"runs/p{seed}",
        )
        for seed in range(number)
    ]


def send(launcher: SlurmLauncher, todo: list[Point]) -> None:
    """What `launch` does."""
    launcher.plan(todo)
    launcher.sweep.add(todo, ["train"])
    (launcher.sweep.folder / CONFIG_FILE).write_text("{}")
    launcher.start(todo)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_token_is_noted_before_sbatch_and_slurms_number_after(
    tmp_path: Path, commands: Path, launcher: Makes
) -> None:
    write(
        commands,
        "sbatch",
        'cat runs/p*/point.json > before; cp "$1" script; echo Submitted batch job 42',
    )
    todo = points(tmp_path, 2)
    made = launcher()
    send(made, todo)
    (folder,) = made.sweep.folder.glob("slurm/*")
    assert [read_job(point.folder) for point in todo] == [{"slurm": "42_0"}, {"slurm": "42_1"}]
    before = (tmp_path / "before").read_text()
    assert f"{folder.name}_0" in before
    assert f"{folder.name}_1" in before
    assert f"#SBATCH --comment={folder.name}\n" in (tmp_path / "script").read_text()
    for job in ("42_1", f"{folder.name}_1"):
        assert log_of(made.sweep.folder, job) is None
    (folder / "42_1_0_log.out").write_text("told")
    (folder / "42_11_0_log.out").write_text("told")
    for job in ("42_1", f"{folder.name}_1"):
        assert log_of(made.sweep.folder, job) == folder / "42_1_0_log.out"


@pytest.mark.parametrize(("array", "name"), [("42 1", "42_1"), (" ", "7")])
def test_a_job_finds_what_it_runs_by_itself_and_keeps_what_it_saved(
    tmp_path: Path, commands: Path, launcher: Makes, array: str, name: str
) -> None:
    """The command that submitted it may be dead by then."""
    write(commands, "sbatch", 'cp "$1" script; echo Submitted batch job 42')
    write(commands, "srun", "exit 0")
    made = launcher()
    send(made, points(tmp_path, 2 if array.strip() else 1))
    (folder,) = made.sweep.folder.glob("slurm/*")
    number, task = array.split(" ")
    told = {"SLURM_JOB_ID": "7"}
    told |= {"SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": task} if number else {}
    subprocess.run(["bash", "script"], env={**os.environ, **told}, check=True)
    kept = folder / f"{name}_submitted.pkl"
    assert kept.read_bytes() == (folder / f"{task or 0}.pkl").read_bytes()
    kept.write_bytes(b"of an earlier start")
    subprocess.run(["bash", "script"], env={**os.environ, **told}, check=True)
    assert kept.read_bytes() == b"of an earlier start"


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("Invalid job array specification", "MaxArraySize"),
        ("QOSMaxSubmitJobPerUserLimit", "in parts"),
        ("Invalid partition name specified", "settings"),
        (
            "Could not establish a configuration source",
            "^no SLURM answers here: [^\n]*launcher=local",
        ),
    ],
)
def test_a_refusal_says_what_to_do_and_leaves_what_was_there(
    tmp_path: Path, commands: Path, launcher: Makes, said: str, message: str
) -> None:
    write(
        commands, "sbatch", f"echo 'sbatch: error: Batch job submission failed: {said}' >&2; exit 1"
    )
    made, todo = launcher(), points(tmp_path, 3)
    with pytest.raises(UsageError, match=message):
        send(made, todo)
    assert not list(tmp_path.glob("runs/**/*.*"))
    assert not list(tmp_path.glob("runs/p*"))

    made = launcher()
    made.sweep.add(todo[:1], ["train"])
    note_job(todo[0], {"slurm": "1_0"})
    before = files(tmp_path / "runs")
    with pytest.raises(UsageError, match=message):
        send(made, todo)
    assert files(tmp_path / "runs") == before


def test_what_was_sent_before_a_refusal_stays_noted(
    tmp_path: Path, commands: Path, launcher: Makes
) -> None:
    write(commands, "scontrol", "echo 'MaxArraySize = 2'")
    write(
        commands,
        "sbatch",
        "[ -e sent ] && { echo 'QOSMaxSubmitJobPerUserLimit' >&2; exit 1; }; touch sent; echo 42",
    )
    made, todo = launcher(array_parallelism=8), points(tmp_path, 5)
    with pytest.raises(UsageError, match="2 jobs were sent"):
        send(made, todo)
    assert [read_job(point.folder) for point in todo] == [
        {"slurm": "42_0"},
        {"slurm": "42_1"},
        {},
        {},
        {},
    ]
    (script,) = made.sweep.folder.glob("slurm/*/submission.sh")
    assert "--array=0-1%2" in script.read_text()
    assert len(made.sweep.points()) == 5


def test_the_cluster_is_noted_with_the_job(tmp_path: Path, commands: Path, launcher: Makes) -> None:
    write(commands, "sbatch", "echo '43;mpp2'")
    send(launcher(additional_parameters={"clusters": "mpp1,mpp2"}), todo := points(tmp_path, 1))
    assert read_job(todo[0].folder) == {"slurm": "43@mpp2"}


def test_without_a_limit_the_script_has_none(
    tmp_path: Path, commands: Path, launcher: Makes
) -> None:
    write(commands, "sbatch", "echo 43")
    made = launcher(timeout_min=None)
    send(made, points(tmp_path, 1))
    (script,) = made.sweep.folder.glob("slurm/*/submission.sh")
    assert "--time" not in script.read_text()


def test_the_module_of_slurm_is_the_scheduler_of_its_name() -> None:
    scheduler: Scheduler = slurm
    assert schedulers()[slurm.NAME] is scheduler


def test_a_job_of_another_scheduler_is_not_submitted_once_more(
    tmp_path: Path, commands: Path, launcher: Makes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def states(jobs: Sequence[str]) -> dict[str, Status]:
        return dict.fromkeys(jobs, Status.WAITING)

    others = {"pbs": types.SimpleNamespace(states=states)}
    monkeypatch.setattr("relloc.sweeps.point_status.schedulers", lambda: others)
    queued, new = points(tmp_path, 2)
    note_job(queued, {"pbs": "77"})
    statuses = launcher()._point_statuses([queued, new])
    assert [now.status for now in statuses] == [Status.WAITING, Status.MISSING]
    assert to_run(statuses) == [new]


def test_a_command_is_on_record_before_it_does_anything(tmp_path: Path) -> None:
    """Where who starts it dies before the note is written, it never runs."""
    script = """
import os, sys
from pathlib import Path
from hydra_plugins.relloc_launchers import starting
from relloc.sweeps.points import Point, read_job
from relloc.tracking.process_identity import is_alive
folder = Path(sys.argv[1])
point = Point(kind="train", name="a", overrides=(), identity="a", folder=folder)
if sys.argv[2] == "dies":
    starting.note_job = lambda *_: os._exit(9)
command = ["sh", "-c", f"echo $$ > {folder}/ran; until [ -e {folder}/seen ]; do sleep 0.1; done"]
process = starting.start_noted(
    point, command, environment=os.environ, output=None, messages=sys.stderr.buffer
)
try:
    assert is_alive(read_job(folder))
finally:
    (folder / "seen").touch()
assert process.wait() == 0
assert read_job(folder)["pid"] == int((folder / "ran").read_text())
"""
    for how, code in (("dies", 9), ("lives", 0)):
        (tmp_path / how).mkdir()
        words = [sys.executable, "-c", script, str(tmp_path / how), how]
        # Returns once the command has closed its output as well.
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == code, done.stderr
        assert (tmp_path / how / "ran").exists() == (how == "lives")


def submitit(*words: str) -> Any:
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        config = loader.load_configuration("train", list(words), run_mode=RunMode.MULTIRUN)
        assert config.hydra.mode == RunMode.MULTIRUN  # also without -m
        return config, hydra.utils.instantiate(config.hydra.launcher)


def test_hydras_own_launcher_has_its_own_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, made = submitit(
        *(
            "hydra/launcher=submitit_slurm",
            "hydra.launcher.partition='a,b'",
            "hydra.launcher.gpus_per_node=4",
        ),
        *("hydra.launcher.tasks_per_node=4", "hydra.launcher.mem_gb=8", "hydra.launcher.name=mine"),
        *(
            "hydra.launcher.comment=bill",
            "hydra.launcher.stderr_to_stdout=true",
            "hydra.launcher.mem_per_gpu=4G",
        ),
        *(
            "+hydra.launcher.additional_parameters={mail-user: me}",
            "+hydra.launcher.srun_args=['--mpi=none']",
        ),
        *(
            "hydra.launcher.setup=[module load cuda]",
            f"hydra.launcher.submitit_folder={tmp_path}/kept/%j",
        ),
        *(
            "hydra.launcher.array_parallelism=3",
            "+hydra.launcher.dry_run=true",
            "+hydra.launcher.nodelist=n1",
        ),
    )
    made.config, made.sweep, made.code = config, Sweep(tmp_path / "s"), tmp_path
    with pytest.raises(SystemExit) as ended:
        made.plan(points(tmp_path, 5))
    assert ended.value.code == 0
    told = capsys.readouterr().out
    for line in (
        *(
            "--partition=a,b",
            "--gpus-per-node=4",
            "--ntasks-per-node=4",
            "--mem=8GB",
            "--comment=bill",
            "--time=60",
        ),
        *(
            "--mem-per-gpu=4G",
            "--mail-user=me",
            "--array=0-4%3",
            "--nodelist=n1",
            "--nodes=1",
            "--signal=USR2@120",
        ),
    ):
        assert f"#SBATCH {line}\n" in told
    assert "#SBATCH --job-name=mine_relloc-" in told  # as the comment is the user's
    assert f"--output={tmp_path}/kept/relloc-dry_run/%A_%a_0_log.out" in told.replace("\n", "")
    assert "--error" not in told
    assert "module load cuda" in told
    assert "--mpi=none" in told


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (
            ("hydra/launcher=submitit_slurm", "+hydra.launcher.partitions=a"),
            "hydra.launcher.partition",
        ),
        (
            ("hydra/launcher=submitit_slurm", "+hydra.launcher.processes=2"),
            "hydra.launcher.processes",
        ),
        (("hydra/launcher=submitit_local", "hydra.launcher.mem_gb=4"), "hydra.launcher.mem_gb"),
        (
            ("hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2"),
            "hydra.launcher.tasks_per_node",
        ),
        (
            ("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=0"),
            "hydra.launcher.timeout_min",
        ),
        (
            ("hydra/launcher=submitit_local", "+hydra.launcher.partition=a"),
            "hydra.launcher.partition",
        ),
    ],
)
def test_settings_that_it_does_not_have_are_named(
    words: tuple[str, ...], named: str, tmp_path: Path
) -> None:
    def plan() -> None:
        config, made = submitit(*words)
        made.config, made.sweep, made.code = config, Sweep(tmp_path / "s"), tmp_path
        made._plain_name, made._plain_folder = "train", made._given["submitit_folder"]
        made.plan(points(tmp_path, 1))

    with pytest.raises((UsageError, hydra.errors.InstantiationException), match=named):
        plan()


@pytest.mark.slow
def test_processes_of_this_machine_take_its_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (
        "hydra.launcher.cpus_per_task=3",
        "hydra.launcher.gpus_per_node=0",
        "hydra.launcher.timeout_min=1",
    )
    config, made = submitit("hydra/launcher=submitit_local", *words)
    made.config, made.sweep, made.code = config, Sweep(tmp_path / "s"), tmp_path
    made._plain_name, made._plain_folder = "train", made._given["submitit_folder"]
    saves = "import json, os, signal, sys, time\n"
    saves += "signal.signal(signal.SIGUSR2, lambda *_: sys.exit(3))\n"
    saves += (
        "threads, devices = os.environ['OMP_NUM_THREADS'], os.environ['CUDA_VISIBLE_DEVICES']\n"
    )
    saves += "print(threads, repr(devices), flush=True); time.sleep(600)"
    monkeypatch.setattr(made, "command", lambda _: [sys.executable, "-c", saves])
    (point,) = todo = points(tmp_path, 1)
    made.plan(todo)
    assert made._limit_s == 60
    log = made.sweep.log(point)

    def end_the_minute() -> None:
        while not (log.exists() and log.read_text()):
            time.sleep(0.01)
        made._limit_s = 0.0

    # However long the process takes to begin, it is over then.
    thread = threading.Thread(target=end_the_minute)
    made._limit_s = math.inf
    thread.start()
    made.follow(todo)
    thread.join()
    assert log.read_text() == "3 ''\n"
    assert json.loads((point.folder / "point.json").read_text())["job"]["pid"] > 0
