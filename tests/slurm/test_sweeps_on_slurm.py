"""What clusters do to jobs, by a real SLURM: points end as if undisturbed, or show as failed."""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from commands import Command, start
from noise_folder import write_noise
from safetensors.torch import load_file

from relloc import sweep
from relloc.results import read_results
from relloc.tracking import open_store, read_journal

DEADLINE_S = 600
STEPS = 160
# After so many, jobs are disturbed; early, as those of a busy machine go on meanwhile
BEGUN = STEPS // 8
# Of the sweep that several tests look at: one point more than the cluster runs at a time
GAPS, JITTERS = (0, 4), (0, 2)
N_POINTS = len(GAPS) * len(JITTERS)


@dataclasses.dataclass(kw_only=True)
class Sweeps:
    """Commands in one folder, beside a SLURM."""

    folder: Path
    environment: dict[str, str]
    settings: tuple[str, ...]
    started: list[Command] = dataclasses.field(default_factory=list)

    def start(self, *words: str, module: str = "train") -> Command:
        flags = [word for word in words if word == "-m"]
        line = [
            *flags,
            *(self.settings if module == "train" else ()),
            *(word for word in words if word != "-m"),
        ]
        self.started.append(
            start(f"relloc.{module}", *line, folder=self.folder, environment=self.environment)
        )
        return self.started[-1]

    def run(self, *words: str, module: str = "train") -> tuple[int, str]:
        return self.ended(self.start(*words, module=module))

    def ended(self, started: Command) -> tuple[int, str]:
        """Exit code, and what was printed."""
        return started.wait(DEADLINE_S), started.text

    def told(self) -> str:
        """What the newest command printed, and the logs of all jobs."""
        return "".join(path.read_text() for path in sorted(self.folder.glob("output_*"))[-1:])

    def logs(self) -> str:
        return "\n".join(
            path.read_text() for path in self.folder.glob("runs/sweeps/*/slurm/*/*_log.*")
        )

    def slurm(self, *words: str) -> str:
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=120, check=True
        )
        return done.stdout

    def point(self, words: str) -> Path:
        """The run folder of the point whose folder's name has these words."""
        (found,) = self.folder.glob(f"runs/train_*{words}*")
        return found

    def wait_for(self, true: Callable[[], object]) -> None:
        end = time.monotonic() + DEADLINE_S
        while not true():
            assert time.monotonic() < end, (
                f"nothing happened in time:\n{self.told()}\n{self.logs()}"
            )
            time.sleep(0.1)

    def nodes_are_up(self) -> bool:
        """Whether both nodes take jobs; one that was set down or drained is asked to."""
        states = dict(
            line.split()
            for line in self.slurm("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T").splitlines()
        )
        for node in (node for node, state in states.items() if state.startswith(("down", "drain"))):
            with contextlib.suppress(subprocess.CalledProcessError):
                self.slurm("scontrol", "update", f"nodename={node}", "state=resume")
        return all(state in ("idle", "mixed", "allocated") for state in states.values())

    def has_trained(self, steps: int, words: str = "seed_0") -> bool:
        """Whether the point's journal has so many steps."""
        found = list(self.folder.glob(f"runs/train_*{words}*"))
        told = read_journal(found[0]) if found else []
        return bool(told) and told[-1].step >= steps

    def job(self, words: str = "seed_0") -> str:
        return json.loads((self.point(words) / "point.json").read_text())["job"]["slurm"]


def on_slurm(*more: str) -> tuple[str, ...]:
    """No more points at a time than leave some of two cores to other tests."""
    settings = ("gpus_per_node=0", "cpus_per_task=1", "timeout_min=60", "array_parallelism=3")
    return ("launcher=slurm", *(f"launcher.{setting}" for setting in settings), *more)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One for all tests, as making it takes seconds."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"
    open_store(uri)
    return uri


@pytest.fixture(scope="module")
def settings(store: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A training of some seconds, with all that is random, on files of noise."""
    root = write_noise(tmp_path_factory.mktemp("images"))
    return (
        *(
            "device=cpu",
            "data=folder",
            f"data.root={root}",
            "recipe.images_per_step=16",
            "recipe.images_per_batch_norm=8",
        ),
        *(
            "grid.patch_px=16",
            "grid.gap_px=4",
            "grid.jitter_px=2",
            "grid.resize.px=64",
            "color=drop",
        ),
        *(
            "model.backbone.widths=[8,8,8,8,8]",
            "model.head.hidden_dim=16",
            "model.head.dropout=0.5",
        ),
        *(
            f"schedule.epochs={STEPS // 4}",
            "schedule.milestone_epochs=[10]",
            "schedule.warmup_epochs=2",
            "report_every_steps=4",
        ),
        *(
            "monitor.every_epochs=null",
            "eval=[]",
            "save_every_s=0",
            "workers=1",
            f"tracking.uri={store}",
        ),
    )


@pytest.fixture(scope="module")
def of_photographs(cluster: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Sweeps:
    """A finished sweep over gap and jitter, evaluated and tracked; jobs mostly wait for imports."""
    settings = (
        *(
            "device=cpu",
            "workers=0",
            "data.source.tiles=[0.4]",
            "data.source.stride=1",
            "recipe.images_per_step=16",
        ),
        *(
            "recipe.images_per_batch_norm=16",
            "schedule.epochs=12",
            "schedule.warmup_epochs=0",
            "schedule.milestone_epochs=[1]",
        ),
        *(
            "grid.patch_px=16",
            "grid.resize.px=80",
            "view.short_px=64",
            "view.crop_px=56",
            "report_every_steps=1",
        ),
        *("model.backbone.widths=[8,8,8,8,8]", "model.head.hidden_dim=16", "eval.knn.k=[1,5]"),
        *("probe.linear.epochs=2", "probe.linear.milestone_epochs=[1]"),
        *(
            f"grid.{name}={','.join(map(str, swept))}"
            for name, swept in (("gap_px", GAPS), ("jitter_px", JITTERS))
        ),
    )
    made = Sweeps(
        folder=tmp_path_factory.mktemp("photographs"), environment=cluster, settings=settings
    )
    made.wait_for(made.nodes_are_up)
    code, told = made.run("-m", *on_slurm("sweep=photographs"))
    planned = f"{N_POINTS} points, {N_POINTS} to run"
    assert (code, planned in told, f"{N_POINTS} done" in told) == (0, True, True), (
        told + made.logs()
    )
    return made


@pytest.fixture
def sweeps(cluster: dict[str, str], settings: tuple[str, ...], tmp_path: Path) -> Iterator[Sweeps]:
    """What a test leaves on the cluster, also where it fails, is gone before the next."""
    made = Sweeps(folder=tmp_path, environment=cluster, settings=settings)
    made.wait_for(made.nodes_are_up)
    yield made
    for process in made.started:
        process.kill()
    made.slurm("scancel", f"--user={os.getuid()}")
    made.wait_for(lambda: not made.slurm("squeue", "-h"))


@pytest.fixture(scope="module")
def undisturbed(
    cluster: dict[str, str], settings: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The weights of seed 0, trained by one command that nothing stopped."""
    alone = Sweeps(
        folder=tmp_path_factory.mktemp("undisturbed"), environment=cluster, settings=settings
    )
    code, told = alone.run("seed=0", "hydra.run.dir=run")
    assert code == 0, told
    return alone.folder / "run" / "backbone.safetensors"


def assert_one_run(run_dir: Path, store: str) -> None:
    """MLflow has one run of the folder, finished, with each report of the journal once."""
    client = open_store(store)
    experiment = client.get_experiment_by_name("relloc")
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`relloc.run_dir` = '{run_dir}'")
    assert run.info.status == "FINISHED"
    stored = [
        (point.step, point.value)
        for point in client.get_metric_history(run.info.run_id, "train/loss")
    ]
    told = [entry for entry in read_journal(run_dir) if "train/loss" in entry.metrics]
    assert sorted(stored) == [(entry.step, entry.metrics["train/loss"]) for entry in told]
    assert told[-1].step == STEPS


def assert_same_bits(one: Path, other: Path) -> None:
    weights, expected = load_file(one), load_file(other)
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected[name]), name


def test_a_failing_point_is_named_with_its_log_and_command_and_the_others_finish(
    sweeps: Sweeps,
) -> None:
    code, told = sweeps.run("-m", "recipe.images_per_step=16,4096", *on_slurm("sweep=one"))
    assert code == 1, told
    assert "1 done, 1 failed" in told
    of_failed = told.partition("failed  images_per_step=4096")[2]
    assert "4096" in of_failed.partition("again, alone:")[0]  # the last lines of its log
    again = of_failed.partition("again, alone: ")[2].splitlines()[0]
    # Submitted as the sweep was
    assert again.startswith("python -m relloc.train --multirun ")
    for word in ("recipe.images_per_step=4096", "launcher=slurm", "sweep=one"):
        assert f" {word}" in again
    failed = sweeps.job("images_per_step_4096")
    assert f"slurm {failed}" in told
    sweeps.wait_for(lambda: "JobState=FAILED" in sweeps.slurm("scontrol", "show", "job", failed))
    assert "ExitCode=1:0" in sweeps.slurm("scontrol", "show", "job", failed)
    with pytest.raises(subprocess.CalledProcessError):  # so all of this works without accounting
        sweeps.slurm("sacct", "-n", "-X", "-j", failed)


def test_of_a_sweep_over_gap_and_jitter_mlflow_has_each_point_once_and_whole(
    of_photographs: Sweeps, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = open_store(f"sqlite:///{of_photographs.folder / 'runs/mlflow.db'}")
    experiment = client.get_experiment_by_name("relloc")
    runs = client.search_runs([experiment.experiment_id])  # all that there are
    assert [run.info.status for run in runs] == ["FINISHED"] * N_POINTS
    assert {run.data.tags["relloc.sweep"] for run in runs} == {"photographs"}
    swept = [
        (int(run.data.params["grid.gap_px"]), int(run.data.params["grid.jitter_px"]))
        for run in runs
    ]
    assert sorted(swept) == list(itertools.product(GAPS, JITTERS))
    losses = set()
    for run, (gap_px, jitter_px) in zip(runs, swept, strict=True):
        run_dir = Path(run.data.tags["relloc.run_dir"])
        assert run_dir == of_photographs.point(f"gap_px_{gap_px}_jitter_px_{jitter_px}_")
        assert run.info.run_name == f"gap{gap_px} jit{jitter_px} 12ep photos small s0 gray"
        assert (
            run.data.tags["slurm.job"]
            == json.loads((run_dir / "point.json").read_text())["job"]["slurm"]
        )
        assert run.data.tags["slurm.nodes"] in ("n1", "n2")
        histories = [client.get_metric_history(run.info.run_id, name) for name in run.data.metrics]
        stored = Counter(
            (point.key, point.step, str(point.value)) for history in histories for point in history
        )
        assert stored == written(run_dir)
        sent = Path(client.download_artifacts(run.info.run_id, ""))
        for name in ("backbone.safetensors", "patches.png", "config.yaml", "results.jsonl"):
            assert (sent / name).read_bytes() == (run_dir / name).read_bytes(), name
        losses.add(
            tuple(
                e.metrics["train/loss"] for e in read_journal(run_dir) if "train/loss" in e.metrics
            )
        )
    assert len(losses) == N_POINTS  # each trained on a question of its own

    monkeypatch.chdir(of_photographs.folder)
    monkeypatch.setenv("SLURM_CONF", of_photographs.environment["SLURM_CONF"])
    assert sweep.main(["status", "runs/sweeps/photographs"]) == 0
    told = capsys.readouterr().out
    assert f"{N_POINTS} done" in told
    assert told.count("100 %") == N_POINTS


def test_the_same_sweep_again_runs_only_what_is_missing_and_a_wider_one_reuses_points(
    of_photographs: Sweeps,
) -> None:
    weights = {
        path: path.stat().st_mtime_ns
        for path in of_photographs.folder.glob("runs/train_*/backbone.safetensors")
    }
    code, told = of_photographs.run("-m", *on_slurm("sweep=photographs"))
    assert code == 0, told
    assert re.search(rf"\b{N_POINTS} points, {N_POINTS} done.*, 0 to run", told)
    wider = (
        "grid.gap_px=0",
        "grid.jitter_px=3,2,0",
        "launcher=local",
        "sweep=b",
        "tracking.experiment=other",
    )
    code, told = of_photographs.run("-m", *wider)
    assert code == 0, told
    assert re.search(r"\b3 points, 2 done.*, 1 to run", told)
    assert {path: path.stat().st_mtime_ns for path in weights} == weights


@pytest.mark.parametrize("does", ["requeue", "preempt"])
def test_a_job_that_the_cluster_takes_goes_on_to_the_same_bits(
    sweeps: Sweeps, undisturbed: Path, store: str, does: str
) -> None:
    started = sweeps.start("seed=0", *on_slurm())
    sweeps.wait_for(lambda: sweeps.has_trained(BEGUN))
    job = sweeps.job()
    if does == "requeue":
        sweeps.slurm("scontrol", "requeue", job)
    else:
        sweeps.slurm("srun", "-p", "high", "-N2", "--exclusive", "true")
    code, told = sweeps.ended(started)
    assert code == 0, told + sweeps.logs()
    run_dir = sweeps.point("seed_0")
    assert_same_bits(run_dir / "backbone.safetensors", undisturbed)
    steps = [entry.step for entry in read_journal(run_dir) if "train/loss" in entry.metrics]
    assert steps == sorted(set(steps))  # no step was told twice
    assert_one_run(run_dir, store)
    assert "1 done" in told
    assert int(json.loads((run_dir / "run.json").read_text())["tags"]["slurm.restarts"]) == 1


def test_a_point_whose_node_dies_goes_on_on_another_to_the_same_bits(
    sweeps: Sweeps, undisturbed: Path, store: str
) -> None:
    """A dead node has no daemon and no process of the job. SLURM finds out by SlurmdTimeout."""
    started = sweeps.start("seed=0", *on_slurm())
    sweeps.wait_for(lambda: sweeps.has_trained(BEGUN))
    number, node = sweeps.slurm("squeue", "-h", "-j", sweeps.job(), "-o", "%A %N").split()
    slurm = Path(sweeps.environment["RELLOC_SLURM_DIR"])
    of_node = [
        int((slurm / f"slurmd-{node}.pid").read_text()),
        *processes_of_job(number, sweeps.environment),
    ]
    assert training(sweeps) in of_node
    for pid in of_node:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    try:
        code, told = sweeps.ended(started)
    finally:
        (slurm / f"slurmd-{node}.pid").unlink()  # the dead one's
        subprocess.run(["slurmd", "-N", node], env=sweeps.environment, check=True, timeout=120)
        sweeps.wait_for((slurm / f"slurmd-{node}.pid").exists)
        with (slurm / "pids").open("a") as pids:  # down.sh ends these
            pids.write((slurm / f"slurmd-{node}.pid").read_text())
    assert code == 0, told + sweeps.logs()
    run_dir = sweeps.point("seed_0")
    assert_same_bits(run_dir / "backbone.safetensors", undisturbed)
    assert_one_run(run_dir, store)
    tags = json.loads((run_dir / "run.json").read_text())["tags"]
    assert tags["slurm.restarts"] == "1"
    assert tags["slurm.nodes"] != node
    assert "1 done" in told


def test_a_killed_process_is_started_again_in_its_job(
    sweeps: Sweeps, undisturbed: Path, store: str
) -> None:
    started = sweeps.start("seed=0", *on_slurm())
    sweeps.wait_for(lambda: sweeps.has_trained(BEGUN))
    os.kill(training(sweeps), signal.SIGKILL)
    code, told = sweeps.ended(started)
    assert code == 0, told + sweeps.logs()
    assert re.search(r"killed .*exit code -9", sweeps.logs())
    assert_same_bits(sweeps.point("seed_0") / "backbone.safetensors", undisturbed)
    assert_one_run(sweeps.point("seed_0"), store)


def test_a_job_at_its_time_limit_saves_and_is_queued_again(sweeps: Sweeps) -> None:
    """SLURM looks at limits every 30 s; a job has a minute to start, as other work may slow it."""
    line = ("launcher.timeout_min=2", "launcher.signal_delay_s=60", "schedule.epochs=100000")
    started = sweeps.start("seed=0", *on_slurm(), *line)
    sweeps.wait_for(lambda: "everything is saved" in sweeps.logs())
    sweeps.wait_for(
        lambda: sweeps.slurm("squeue", "-h", "-j", sweeps.job(), "-o", "%T").strip() == "PENDING"
    )
    before = read_journal(sweeps.point("seed_0"))[-1].step
    sweeps.wait_for(lambda: sweeps.has_trained(before + 8))
    sweeps.slurm("scancel", sweeps.job())
    code, told = sweeps.ended(started)
    assert code == 1
    assert "1 cancelled" in told


def test_a_cancelled_point_hides_no_other_and_the_sweep_goes_on_without_its_command(
    sweeps: Sweeps, undisturbed: Path, store: str
) -> None:
    started = sweeps.start("-m", "seed=0,1", *on_slurm("sweep=c"))
    sweeps.wait_for(lambda: sweeps.has_trained(BEGUN, "seed_0"))
    started.kill()  # the login shell is gone
    sweeps.slurm("scancel", sweeps.job("seed_1"))
    code, told = sweeps.run("wait", "runs/sweeps/c", module="sweep")
    assert code == 1, told
    assert "1 done, 1 cancelled" in told
    assert_same_bits(sweeps.point("seed_0") / "backbone.safetensors", undisturbed)
    code, told = sweeps.run("-m", "seed=0,1", *on_slurm("sweep=c"))
    assert code == 0, told
    assert re.search(r"\b2 points, 1 done.*, 1 to run", told)
    assert sweeps.run("status", "runs/sweeps/c", module="sweep")[0] == 0
    for words in ("seed_0", "seed_1"):
        assert_one_run(sweeps.point(words), store)


def test_what_relloc_sweep_cancels_is_cancelled_whether_it_had_begun_or_not(sweeps: Sweeps) -> None:
    started = sweeps.start(
        "-m",
        "seed=0,1",
        "schedule.epochs=100000",
        *on_slurm("sweep=d", "launcher.array_parallelism=1"),
    )
    sweeps.wait_for(lambda: sweeps.has_trained(8, "seed_0"))
    assert sweeps.run("cancel", "d", module="sweep")[0] == 0
    assert sweeps.ended(started)[0] == 1
    code, told = sweeps.run("status", "sweep=d", module="sweep")
    assert (code, "2 cancelled" in told) == (1, True), told


def test_a_job_that_is_cancelled_by_hand_before_it_began_has_not_failed(sweeps: Sweeps) -> None:
    later = "+launcher.additional_parameters.begin=now+1hour"
    started = sweeps.start("-m", "seed=0,1", later, *on_slurm("sweep=e"))
    sweeps.wait_for(lambda: len(sweeps.slurm("squeue", "--noheader", "--array").splitlines()) == 2)
    sweeps.slurm("scancel", f"--user={os.getuid()}")
    code, told = sweeps.ended(started)
    assert (code, "2 cancelled" in told) == (1, True), told


def test_two_nodes_train_together_and_a_killed_rank_starts_the_job_again(
    sweeps: Sweeps, store: str
) -> None:
    started = sweeps.start("seed=0", *on_slurm("launcher.nodes=2"))
    sweeps.wait_for(lambda: sweeps.has_trained(BEGUN))
    os.kill(training(sweeps), signal.SIGKILL)
    code, told = sweeps.ended(started)
    assert code == 0, told + sweeps.logs()
    run_dir = sweeps.point("seed_0")
    tags = json.loads((run_dir / "run.json").read_text())["tags"]
    assert (tags["slurm.nodes"], tags["slurm.restarts"]) == ("n[1-2]", "1")
    assert_one_run(run_dir, store)


def test_jobs_run_the_code_and_configs_of_their_submission(of_photographs: Sweeps) -> None:
    (copy,) = (of_photographs.folder / "runs/sweeps/photographs/code").iterdir()
    for gap_px, jitter_px in itertools.product(GAPS, JITTERS):
        record = json.loads(
            (
                of_photographs.point(f"gap_px_{gap_px}_jitter_px_{jitter_px}_") / "run.json"
            ).read_text()
        )
        assert record["tags"]["relloc.code"] == str(copy / "relloc")
        assert record["tags"]["relloc.sweep"] == "photographs"


def test_hydras_own_name_of_the_launcher_submits_sweeps_and_single_runs(
    sweeps: Sweeps, store: str
) -> None:
    line = (
        "hydra/launcher=submitit_slurm",
        "hydra.launcher.partition=main,high",
        "hydra.launcher.name=mine",
    )
    line += (
        "hydra.launcher.timeout_min=60",
        "hydra.launcher.cpus_per_task=1",
        "schedule.epochs=12",
    )
    code, told = sweeps.run("-m", "seed=0,1", *line, "sweep=s")
    assert (code, "2 done" in told) == (0, True), told + sweeps.logs()
    for words in ("seed_0", "seed_1"):
        tags = json.loads((sweeps.point(words) / "run.json").read_text())["tags"]
        assert tags["slurm.job"] == sweeps.job(words)
        shown = sweeps.slurm("scontrol", "show", "job", sweeps.job(words))
        assert (
            "Partition=main,high" in shown or "Partition=high" in shown or "Partition=main" in shown
        )
        assert "JobName=mine" in shown
        assert "TimeLimit=01:00:00" in shown
    kept = list(sweeps.folder.glob("runs/sweeps/s/.submitit/*/*_log.out"))
    assert {path.name.partition("_0_log")[0] for path in kept} == {
        sweeps.job("seed_0"),
        sweeps.job("seed_1"),
    }
    code, told = sweeps.run(
        "-m", "seed=0,1", "hydra/launcher=submitit_slurm", "schedule.epochs=12", "sweep=s"
    )
    assert (code, "2 done before, 0 to run" in told) == (0, True), told

    code, told = sweeps.run("seed=2", *line, "sweep=alone")
    assert (code, "1 done" in told) == (0, True), told + sweeps.logs()
    record = json.loads((sweeps.point("seed_2") / "run.json").read_text())
    assert record["tags"]["slurm.job"] == sweeps.job("seed_2")
    assert record["tags"]["relloc.sweep"] == "alone"


def test_a_command_killed_before_it_notes_its_jobs_finds_them_again(
    sweeps: Sweeps, store: str
) -> None:
    """The first of two commands with the same points dies as soon as sbatch has its answer."""
    real = shutil.which("sbatch")
    killing = sweeps.folder / "bin" / "sbatch"
    killing.parent.mkdir()
    killing.write_text(f'#!/bin/sh\n{real} --begin=now+1hour "$@" > answer\nkill -9 $PPID\n')
    killing.chmod(0o755)
    usual = dict(sweeps.environment)
    sweeps.environment = usual | {"PATH": f"{killing.parent}:{usual['PATH']}"}
    code, told = sweeps.run("-m", "seed=0,1", *on_slurm("sweep=k", "schedule.epochs=12"))
    assert code == -signal.SIGKILL, told
    assert "Submitted batch job" in (sweeps.folder / "answer").read_text()
    assert sweeps.job("seed_0").startswith("relloc-")
    sweeps.environment = usual
    code, told = sweeps.run("status", "runs/sweeps/k", module="sweep")
    assert (code, "2 waiting" in told) == (0, True), told
    started = sweeps.start("-m", "seed=0,1", *on_slurm("sweep=k", "schedule.epochs=12"))
    sweeps.wait_for(lambda: re.search(r"\b2 in flight.*, 0 to run", started.text))
    number = re.findall(r"\d+", (sweeps.folder / "answer").read_text())[0]
    sweeps.slurm("scontrol", "update", f"JobId={number}", "StartTime=now")
    sweeps.ended(started)
    code, told = sweeps.run("wait", "runs/sweeps/k", module="sweep")
    assert (code, "2 done" in told) == (0, True), told + sweeps.logs()
    for words, task in (("seed_0", 0), ("seed_1", 1)):
        tags = json.loads((sweeps.point(words) / "run.json").read_text())["tags"]
        assert (tags["slurm.job"], tags["slurm.restarts"]) == (f"{number}_{task}", "0")


def test_jobs_that_are_known_by_their_token_are_cancelled(sweeps: Sweeps) -> None:
    started = sweeps.start("-m", "seed=0,1", "schedule.epochs=100000", *on_slurm("sweep=c"))
    for words in ("seed_0", "seed_1"):
        sweeps.wait_for(lambda words=words: sweeps.has_trained(4, words))
    started.kill()
    script = next(sweeps.folder.glob("runs/sweeps/c/slurm/*/submission.sh"))
    tokens = [f"{script.parent.name}_{task}" for task in range(2)]
    assert clients_states(tokens, sweeps) == dict.fromkeys(tokens, "RUNNING")
    for words, token in zip(("seed_0", "seed_1"), tokens, strict=True):
        noted = json.loads((sweeps.point(words) / "point.json").read_text())
        (sweeps.point(words) / "point.json").write_text(
            json.dumps(noted | {"job": {"slurm": token}})
        )
    code, told = sweeps.run("cancel", "runs/sweeps/c", module="sweep")
    assert (code, "2 points" in told) == (0, True), told
    sweeps.wait_for(lambda: set(clients_states(tokens, sweeps).values()) <= {"CANCELLED"})


def clients_states(jobs: list[str], sweeps: Sweeps) -> dict[str, str]:
    """As relloc asks this cluster."""
    asks = "import json, sys; from hydra_plugins.relloc_launchers.clients import states; "
    asks += "print(json.dumps(states(sys.argv[1:])))"
    return json.loads(sweeps.slurm(sys.executable, "-c", asks, *jobs))


def test_more_points_than_an_array_may_have_are_several_arrays(sweeps: Sweeps) -> None:
    """This cluster allows a thousand: a scontrol before the real one answers a smaller number."""
    saying = sweeps.folder / "bin" / "scontrol"
    saying.parent.mkdir()
    real = shutil.which("scontrol")
    saying.write_text(
        f'#!/bin/sh\n[ "$1 $2" = "show config" ] && echo "MaxArraySize = 2" || exec {real} "$@"\n'
    )
    saying.chmod(0o755)
    sweeps.environment = sweeps.environment | {
        "PATH": f"{saying.parent}:{sweeps.environment['PATH']}"
    }
    code, told = sweeps.run("-m", "seed=0,1,2", *on_slurm("sweep=p", "schedule.epochs=12"))
    assert (code, "3 done" in told) == (0, True), told + sweeps.logs()
    jobs = [sweeps.job(f"seed_{seed}") for seed in range(3)]
    assert len({job.partition("_")[0] for job in jobs}) == 2
    assert [job.partition("_")[2] for job in jobs] == ["0", "1", ""]


def written(run_dir: Path) -> Counter[tuple[str, int, str]]:
    """Every point that MLflow is to have of a run: metric, step and value."""
    points = []
    system = (
        [run_dir / "system.jsonl"] if (run_dir / "system.jsonl").exists() else []
    )  # its first line comes after 15 s
    for path in (run_dir / "journal.jsonl", *system):
        for entry in map(json.loads, path.read_text().splitlines()):
            points += [
                (metric, entry["step"], str(float(value)))
                for metric, value in entry["metrics"].items()
            ]
    rows = read_results(run_dir)
    for row in rows:
        points.append((row.tracked_name, 0, str(row.value)))
        of_eval = row.tracked_name.partition("/")[0]
        if row.layer.startswith("feature"):
            points.append(
                (
                    f"{of_eval}/{row.metric}_by_layer",
                    int(row.layer.removeprefix("feature")),
                    str(row.value),
                )
            )
        if row.eval == "knn":
            points.append(
                (
                    f"{of_eval}/{row.layer}/top1_by_k",
                    int(row.metric.removeprefix("top1_k")),
                    str(row.value),
                )
            )
    assert Counter(row.eval for row in rows) == {
        "pretext": 1,
        "linear_fast": 2 * 5,
        "knn": 2 * 6 * 2,
    }
    return Counter(points)


def processes_of_job(number: str, environment: dict[str, str]) -> list[int]:
    """SLURM's own processes of a job first, as they would tell of the end of the others."""
    stepds, others = [], []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_text()
            told = set((folder / "environ").read_text().split("\0"))
        except OSError:
            continue
        if words.startswith(f"slurmstepd: [{number}."):
            stepds.append(int(folder.name))
        elif {f"SLURM_JOB_ID={number}", f"SLURM_CONF={environment['SLURM_CONF']}"} <= told:
            others.append(int(folder.name))
    return stepds + others


def training(sweeps: Sweeps) -> int:
    """A process that trains, not one of its workers nor submitit's that started it."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_text().split("\0")
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            above = Path("/proc", parent, "cmdline").read_text().split("\0")
        except OSError:
            continue
        if (
            "relloc.train" in words
            and any(str(sweeps.folder) in word for word in words)
            and "submitit.core._submit" in above
        ):
            return int(folder.name)
    raise AssertionError("nothing trains")
