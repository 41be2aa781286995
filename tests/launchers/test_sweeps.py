"""Sweeps as processes of this machine, and what is submitted to SLURM; tests/slurm has a SLURM."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from commands import start
from hydra import compose, initialize_config_dir
from hydra_plugins.relloc_launchers.processes import ProcessLauncher
from noise_folder import write_noise
from omegaconf import OmegaConf

import relloc as relloc_package
from relloc.runs.settings import conf_dir
from relloc.sweeps.points import Point, identity_of, note_job
from relloc.sweeps.sweep import Sweep
from relloc.tracking import RunRecord, read_journal, write_status
from relloc.tracking.process_identity import process_identity
from relloc.tracking.record import commit_of

TINY = (
    *(
        "data.source.tiles=[0.4]",
        "data.source.stride=0.5",
        "recipe.images_per_step=16",
        "recipe.images_per_batch_norm=16",
    ),
    *(
        "grid.patch_px=16",
        "grid.gap_px=4",
        "grid.jitter_px=2",
        "grid.resize.px=64",
        "schedule.epochs=1",
    ),
    *(
        "schedule.warmup_epochs=0",
        "schedule.milestone_epochs=[]",
        "eval=[]",
        "monitor.every_epochs=null",
        "device=cpu",
    ),
)


def environment(**more: str) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RELLOC_", "MLFLOW_", "HYDRA_"))
    }
    return {**kept, "OMP_NUM_THREADS": "1", "COLUMNS": "160", "CUDA_VISIBLE_DEVICES": "", **more}


def relloc(folder: Path, module: str, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m relloc.MODULE WORDS` in a folder, to which only the command adds files."""
    if "PYTHONPATH" in more:  # for an interpreter that has not begun
        line = [sys.executable, "-m", f"relloc.{module}", *words]
        return subprocess.run(
            line,
            cwd=folder,
            env=environment(**more),
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
    with tempfile.TemporaryDirectory() as told:
        output, messages = Path(told, "output"), Path(told, "messages")
        command = start(
            f"relloc.{module}",
            *words,
            folder=folder,
            output=output,
            messages=messages,
            environment=environment(**more),
        )
        code = command.wait(600)
        return subprocess.CompletedProcess(words, code, output.read_text(), messages.read_text())


def point(folder: Path, words: str) -> Path:
    (found,) = folder.glob(f"runs/*_{words}_*")
    return found


@pytest.mark.slow
def test_points_run_beside_each_other_each_with_a_gpu_of_its_own_and_a_failing_one_stops_none(
    tmp_path: Path,
) -> None:
    line = (
        "-m",
        *TINY,
        "tracking=none",
        "recipe.images_per_step=16,4096",
        "launcher=local",
        "sweep=s",
    )
    done = relloc(tmp_path, "train", *line, CUDA_VISIBLE_DEVICES="3,5")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 points, 2 to run" in done.stdout
    assert "1 done, 1 failed" in done.stdout
    of_failed = done.stdout.partition("failed  images_per_step=4096")[2]
    assert re.search(r"\b140 training images .*\b4096\b", of_failed)
    assert f"hydra.run.dir={point(tmp_path, 'images_per_step_4096')}" in of_failed
    assert "Traceback" not in of_failed
    noted = json.loads((tmp_path / "runs/sweeps/s/sweep.json").read_text())["points"]
    assert [one["name"] for one in noted] == ["images_per_step=16", "images_per_step=4096"]
    assert all(Path(one["folder"]).parent == tmp_path / "runs" for one in noted)
    told = relloc(tmp_path, "sweep", "status", "runs/sweeps/s")
    assert (told.returncode, "1 done, 1 failed" in told.stdout) == (1, True)
    assert of_failed.strip() in told.stdout

    trained = point(tmp_path, "images_per_step_16") / "backbone.safetensors"
    commit = RunRecord.read(trained.parent).tags.get("relloc.commit")
    assert (commit or "")[:40] == (commit_of(Path(relloc_package.__file__)) or "")[
        :40
    ]  # not lost in the sweep's copy
    written = trained.stat().st_mtime_ns
    wider = (
        *(word for word in line if not word.startswith(("sweep=", "recipe.images_per_step="))),
        "sweep=t",
    )
    again = relloc(
        tmp_path,
        "train",
        *wider,
        "recipe.images_per_step=16",
        "seed=1,0",
        "tracking.experiment=other",
    )
    assert again.returncode == 0, again.stdout
    assert re.search(r"\b2 points, 1 done.*, 1 to run", again.stdout)
    assert trained.stat().st_mtime_ns == written


def test_gpus_are_handed_out_one_a_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    seen = (
        "import os, sys, time; time.sleep(0.5); "
        "open(sys.argv[1], 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])"
    )

    class Telling(ProcessLauncher):
        def command(self, point: Point) -> list[str]:
            return [sys.executable, "-c", seen, str(point.folder / "gpu")]

    launcher = Telling(OmegaConf.create({"name": "local", "processes": "auto"}))
    launcher.sweep, launcher.code = Sweep(tmp_path / "sweep"), tmp_path
    points = [
        Point(kind="train", name=name, overrides=(), identity=name, folder=tmp_path / "runs" / name)
        for name in "abcd"
    ]
    launcher.plan(points)
    launcher.follow(points)
    assert sorted(path.read_text() for path in tmp_path.glob("runs/*/gpu")) == ["3", "3", "5", "5"]
    assert {path.read_text() for path in (tmp_path / "runs/a/gpu", tmp_path / "runs/b/gpu")} == {
        "3",
        "5",
    }


def test_what_waits_is_looked_at_again_before_it_starts(tmp_path: Path) -> None:
    """Two commands planned the same points; and one whose sweep is cancelled starts none."""
    runs = (
        "import pathlib, sys; from relloc.tracking import write_status; "
        "folder = pathlib.Path(sys.argv[1]); "
        "open(folder / 'started', 'a').write('x'); write_status(folder, 'FINISHED')"
    )

    class Short(ProcessLauncher):
        def command(self, point: Point) -> list[str]:
            return [sys.executable, "-c", runs, str(point.folder)]

    points = [
        Point(kind="train", name=name, overrides=(), identity=name, folder=tmp_path / "runs" / name)
        for name in "ab"
    ]
    launchers = [Short(OmegaConf.create({"name": "local", "processes": 2})) for _ in range(3)]
    for launcher in launchers:
        launcher.sweep, launcher.code = Sweep(tmp_path / "sweep"), tmp_path
        launcher.plan(points)
    launchers[0].follow(points)
    launchers[1].follow(points)
    assert [(tmp_path / "runs" / name / "started").read_text() for name in "ab"] == ["x", "x"]
    for name in "ab":
        write_status(tmp_path / "runs" / name, "KILLED")
    launchers[2].sweep.cancel()
    launchers[2].follow(points)
    assert [(tmp_path / "runs" / name / "started").read_text() for name in "ab"] == ["x", "x"]


def test_the_copy_of_the_code_wins_over_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the checkout, which may change before a job begins, and over the current folder."""
    monkeypatch.delenv("RELLOC_CONF", raising=False)
    launcher = ProcessLauncher(OmegaConf.create({"name": "here", "processes": 1}))
    launcher.sweep = Sweep(tmp_path / "sweep")
    launcher.code = launcher.sweep.copy(launcher._content())
    (tmp_path / "relloc").mkdir()
    (tmp_path / "relloc/__init__.py").write_text("raise SystemExit('not this one')")
    one = Point(kind="train", name="a", overrides=(), identity="a", folder=tmp_path / "run")
    python = launcher.command(one)[: -len(one.arguments)]
    asked = (
        "from relloc.runs import settings, start_command; "
        "import hydra_plugins.relloc_launchers as plugins; "
        "print(start_command.__file__, settings.conf_dir(), plugins.__file__)"
    )
    told = subprocess.run(
        [*python, "-c", asked],
        cwd=tmp_path,
        env=launcher.environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    used = ("relloc/runs/start_command.py", "conf", "hydra_plugins/relloc_launchers/__init__.py")
    assert told.stdout.split() == [str(launcher.code / name) for name in used]


@pytest.mark.slow
def test_a_stopped_sweep_saves_its_point_starts_no_other_and_goes_on(tmp_path: Path) -> None:
    line = (
        "-m",
        *TINY,
        "tracking=none",
        "seed=0,1",
        "schedule.epochs=8",
        "report_every_steps=1",
        "sweep=s",
    )
    reached = 0
    for number in (signal.SIGINT, signal.SIGTERM):
        started = start("relloc.train", *line, folder=tmp_path, environment=environment())
        # Until the second report of this command: the first comes just before the training begins
        # to wait for signals.
        assert started.wait_for(lambda at=reached + 2: newest_step(tmp_path) >= at), started.text
        os.kill(started.pid, number)
        assert started.wait() == 1
        told = started.text
        assert "2 points, 2 to run" in told
        assert "everything is saved" in told
        assert "1 stopped, 1 missing" in told
        assert (
            newest_step(tmp_path) > reached
        )  # the second command went on where the first was stopped
        reached = newest_step(tmp_path)
    again = relloc(tmp_path, "train", *line)
    assert (again.returncode, "2 points, 2 to run" in again.stdout) == (0, True), (
        again.stdout + again.stderr
    )
    assert "2 done" in again.stdout


def newest_step(folder: Path) -> int:
    """Of the only point that has begun; 0 before it has."""
    found = list(folder.glob("runs/*/journal.jsonl"))
    told = read_journal(found[0].parent) if found else []
    return told[-1].step if told else 0


def config_of(*words: str) -> dict:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("train", list(words))
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


def test_a_point_is_what_it_computes_not_where_nor_how_it_is_followed() -> None:
    one = identity_of(config_of("grid.gap_px=32"))
    assert len(one) == 12
    elsewhere = (
        "launcher=slurm",
        "launcher.nodes=2",
        "tracking=none",
        "sweep=other",
        "workers=3",
        "runs=there",
    )
    assert identity_of(config_of("grid.gap_px=32", *elsewhere)) == one
    assert (
        identity_of(
            config_of("grid.gap_px=32", "device=cpu", "compile=false", "images_per_forward=128")
        )
        == one
    )
    assert identity_of(config_of("grid.gap_px=32", "recipe.lr=0.4", "optimizer.lr=0.8")) == one
    for other in (
        "grid.gap_px=31",
        "seed=1",
        "model=resnet18",
        "color=drop",
        "eval=[]",
        "schedule.epochs=3",
        "precision=fp32",
    ):
        assert identity_of(config_of("grid.gap_px=32", other)) != one, other


GOLDEN = Path(__file__).with_name("slurm_batch_script.txt")


@pytest.mark.slow
@pytest.mark.parametrize("single", [False, True])
def test_the_batch_script(tmp_path: Path, single: bool) -> None:
    """A dry run submits nothing, and needs no SLURM."""
    words = (
        "launcher.nodes=2",
        "launcher.gpus_per_node=8",
        "launcher.partition=gpu",
        "launcher.account=vision",
    )
    more = ("launcher.setup=[module load cuda]", "+launcher.submitit.mem_per_gpu=64G", "sweep=gaps")
    swept = ("grid.gap_px=0,16,32",) if not single else ("grid.gap_px=16",)
    done = relloc(
        tmp_path,
        "train",
        *(() if single else ("-m",)),
        "launcher=slurm",
        "launcher.dry_run=true",
        *words,
        *more,
        *swept,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    script = done.stdout[
        done.stdout.index("#!/bin/bash") : done.stdout.index("nothing was submitted")
    ]
    told = script.replace(str(tmp_path), "FOLDER").replace(sys.executable, "PYTHON")
    assert not list(tmp_path.iterdir())
    if single:
        assert "--array" not in told
        return
    accept = "to accept it: RELLOC_ACCEPT=1 pytest tests/launchers -k batch_script"
    if os.environ.get("RELLOC_ACCEPT"):
        GOLDEN.write_text(told)
    assert told == GOLDEN.read_text(), accept


@pytest.mark.slow
def test_every_member_of_a_group_may_be_a_point(tmp_path: Path) -> None:
    root = write_noise(tmp_path / "photographs")
    words = ("experiment=ablation", "ablation=glob(*,exclude=wide)", f"data.root={root}", "eval=[]")
    done = relloc(tmp_path, "train", "-m", *words, "launcher=slurm", "launcher.dry_run=true")
    assert done.returncode == 0, done.stdout + done.stderr
    n_variants = len(list((conf_dir() / "ablation").glob("*.yaml"))) - 1
    assert f"{n_variants} points, {n_variants} to run" in done.stderr + done.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("sbatch") is not None, reason="SLURM is here")
def test_without_slurm_it_is_told_at_once(tmp_path: Path) -> None:
    done = relloc(tmp_path, "train", "launcher=slurm")
    assert done.returncode == 2
    assert "no sbatch" in done.stderr


@pytest.mark.slow
def test_a_launcher_that_pickles_hydra_is_refused_before_anything_is_started(
    tmp_path: Path,
) -> None:
    """hydra-submitit-launcher's own class, which `hydra/launcher=submitit_local` does not name."""
    site = tmp_path / "own/hydra/launcher/site.yaml"
    site.parent.mkdir(parents=True)
    site.write_text(
        "_target_: hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher\n"
        "submitit_folder: ${hydra.sweep.dir}/.submitit/%j\ntimeout_min: 1\n"
    )
    done = relloc(
        tmp_path,
        "train",
        "-m",
        "hydra/launcher=site",
        "seed=0,1",
        RELLOC_CONF=str(tmp_path / "own"),
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "hydra/launcher=submitit_slurm" in done.stderr
    assert "launcher=local" in done.stderr
    assert not list(tmp_path.rglob("*_log.*"))


@pytest.mark.slow
def test_a_launcher_chosen_twice_and_settings_swept_are_refused(tmp_path: Path) -> None:
    for words in (
        ("launcher=slurm", "hydra/launcher=submitit_slurm"),
        ("launcher=slurm", "launcher.dry_run=true", "launcher.partition=choice(a,b)"),
        ("launcher=local,here",),
        ("sweep=a,b",),
    ):
        done = relloc(tmp_path, "train", "-m", "seed=0,1", *words)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert not list(tmp_path.iterdir())


def names_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.slow
def test_a_sweep_that_is_refused_or_only_shown_leaves_everything_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code/mine.py").touch()
    before = names_below(tmp_path)
    shown = ("launcher=slurm", "launcher.dry_run=true", "launcher.gpus_per_node=0")
    for words, code, told in (
        (("hydra.sweep.dir=.", "seed=0,1"), 2, "hydra.sweep.dir="),
        (("sweep=..", "seed=0,1"), 2, "sweep=.. "),
        (("launcher.processes=0", "seed=0,1"), 2, "launcher.processes=0"),
        ((*shown, "grid.gap_px=0,48", "sweep=s"), 2, "1 of 2 points can't be run"),
        ((*shown, "seed=0,1", "sweep=s"), 0, ""),
    ):
        done = relloc(tmp_path, "train", "-m", *words)
        assert (done.returncode, told in done.stderr) == (code, True), done.stderr
        assert "Traceback" not in done.stderr
        assert names_below(tmp_path) == before, words


@pytest.mark.slow
@pytest.mark.parametrize("mode", [(), ("-m",)])
def test_a_folder_of_its_own_to_stand_in_is_refused(tmp_path: Path, mode: tuple[str, ...]) -> None:
    done = relloc(tmp_path, "train", *mode, "hydra.job.chdir=true", *TINY, "tracking=none")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "hydra.job.chdir" in done.stderr
    assert not list(tmp_path.rglob("*.*"))


SEARCHES = """
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper

class Searches(Sweeper):
    def setup(self, *, hydra_context, task_function, config):
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments):
        for step in (16, 4096):
            (found,) = self.launcher.launch([(*arguments, f"recipe.images_per_step={step}")], 0)
            try:
                print("VALUE", repr(found.return_value))
            except ValueError as error:
                print("FAILED", error)

node = {"_target_": "hydra_plugins.searches.sweeper.Searches"}
ConfigStore.instance().store(group="hydra/sweeper", name="searches", node=node, provider="test")
"""


@pytest.mark.slow
def test_a_sweeper_that_searches_gets_a_number_or_is_refused(tmp_path: Path) -> None:
    """Its points find what --config-dir names, as the command does."""
    (tmp_path / "plugins/hydra_plugins/searches").mkdir(parents=True)
    (tmp_path / "plugins/hydra_plugins/searches/__init__.py").touch()
    (tmp_path / "plugins/hydra_plugins/searches/sweeper.py").write_text(SEARCHES)
    (tmp_path / "own/color").mkdir(parents=True)
    (tmp_path / "own/color/mine.yaml").write_text("defaults: [gray, _self_]\n")
    path = os.pathsep.join(filter(None, (str(tmp_path / "plugins"), os.environ.get("PYTHONPATH"))))
    tiny = [word for word in TINY if not word.startswith("recipe.images_per_step")]
    line = (
        "--config-dir=own",
        "-m",
        "hydra/sweeper=searches",
        *tiny,
        "tracking=none",
        "color=mine",
        "sweep=s",
    )
    refused = relloc(tmp_path, "train", *line, PYTHONPATH=path)
    assert (refused.returncode, "objective=" in refused.stderr) == (2, True), refused.stderr
    assert not (tmp_path / "runs").exists()
    done = relloc(tmp_path, "train", *line, "objective=pretext/top1", PYTHONPATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = map(
        json.loads,
        (point(tmp_path, "images_per_step_16") / "results.jsonl").read_text().splitlines(),
    )
    assert f"VALUE {row['value']!r}\n" in done.stdout
    failed = done.stdout.partition("FAILED ")[2].splitlines()[0]
    assert re.search(r"\b140 training images .*\b4096\b", failed)


@pytest.mark.slow
def test_status_of_what_is_no_sweep_is_one_message(tmp_path: Path) -> None:
    done = relloc(tmp_path, "sweep", "status", "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.search(r"^relloc: nowhere .*\bruns/sweeps: ", done.stderr)
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_mistakes_with_sweeps_end_in_one_message(tmp_path: Path) -> None:
    odd = relloc(tmp_path, "train", "-m", "launcher=local", "launcher.processes=abc", "seed=0")
    assert odd.returncode == 2
    assert re.fullmatch(r"relloc: launcher\.processes=abc .*auto .* 1 or more\n", odd.stderr)
    assert not list(tmp_path.rglob("code"))
    for words, told in (
        (("launcher.setup=abc",), "launcher.setup=abc is not a list, such as [abc]"),
        (("launcher.timeout_min=abc",), "launcher settings that submitit does not take: "),
        (("launcher.dry_run=maybe",), "launcher.dry_run=maybe is neither true nor false"),
    ):
        odd = relloc(tmp_path, "train", "launcher=slurm", "launcher.dry_run=true", *words)
        assert (odd.returncode, odd.stderr.startswith(f"relloc: {told}")) == (2, True), odd.stderr
        assert odd.stderr.count("\n") == 1
    # The preset has this setting, but no point measures what it belongs to.
    words = ("experiment=gap_jitter_small", "data.root=.", "eval=[],[knn]")
    unused = "eval.voc07_low_shot.shots"
    odd = relloc(tmp_path, "train", "-m", "launcher=local", *words, f"{unused}=[1]")
    assert (odd.returncode, unused in odd.stderr) == (2, True), odd.stderr
    assert not list(tmp_path.rglob("code"))
    # Its values would make each point twice, of which one would be taken.
    words = ("experiment=gap_jitter_small", "data.root=.", "eval=[]", f"{unused}=[1],[2]")
    odd = relloc(tmp_path, "train", "-m", "launcher=local", *words)
    assert (odd.returncode, unused in odd.stderr, odd.stdout) == (2, True, ""), odd.stderr
    assert not list(tmp_path.rglob("code"))
    damaged = tmp_path / "runs/sweeps/s/sweep.json"
    damaged.parent.mkdir(parents=True, exist_ok=True)
    damaged.write_text('{"points": [')
    for told in (
        relloc(tmp_path, "sweep", "status", str(damaged.parent)),
        relloc(tmp_path, "train", "-m", "seed=0,1", "sweep=s"),
    ):
        assert told.returncode == 2
        assert told.stderr.startswith(f"relloc: {damaged} ")
        assert told.stderr.count("\n") == 1
    assert [path.name for path in damaged.parent.iterdir()] == ["sweep.json"]


@pytest.mark.slow
def test_a_running_point_is_ended_by_its_number(tmp_path: Path) -> None:
    """Of a sweep whose command is gone."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    running = Point(kind="train", name="a", overrides=(), identity="a", folder=tmp_path / "run")
    note_job(running, process_identity(child.pid))
    sweep = Sweep(tmp_path / "sweeps" / "s")
    with sweep.locked():
        sweep.add([running], ["train"])
    done = relloc(tmp_path, "sweep", "cancel", str(sweep.folder))
    assert done.returncode == 0
    assert "1 point" in done.stdout
    assert child.wait(60) == -signal.SIGTERM
    child.communicate()
