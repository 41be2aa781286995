"""Which words of a command reach its points."""

from pathlib import Path

import pytest
from hydra_plugins.relloc_launchers import passing
from hydra_plugins.relloc_launchers.processes import ProcessLauncher
from omegaconf import DictConfig, OmegaConf

from relloc.runs import command_line


def config(
    *of_hydra: str,
    name: str = "train",
    job: str = "train",
    sources: tuple[tuple[str, str], ...] = (),
) -> DictConfig:
    listed = [{"provider": provider, "schema": "file", "path": path} for provider, path in sources]
    hydra = {
        "overrides": {"hydra": list(of_hydra)},
        "job": {"config_name": name, "name": job},
        "runtime": {
            "config_sources": [
                {"provider": "hydra", "schema": "pkg", "path": "hydra.conf"},
                *listed,
            ]
        },
    }
    return OmegaConf.create({"hydra": hydra})


def test_words_of_the_launcher_are_not_of_a_point() -> None:
    words = ["grid.gap_px=1", "launcher=slurm", "+launcher.submitit.x=1", "sweep=s", "seed=0"]
    assert passing.of_points(words) == ["grid.gap_px=1", "seed=0"]
    assert passing.names_launcher(words)
    assert not passing.names_launcher(["launcher.processes=2"])


def test_what_a_sweeper_chose_is_not_on_the_command_line() -> None:
    given = config()
    given.hydra.overrides.task = ["seed=0", "optimizer.lr=interval(0.1,1)"]
    assert passing.chosen(["seed=0", "optimizer.lr=0.3"], given) == ["optimizer.lr=0.3"]


def test_hydras_settings_of_a_job_are_passed_on_those_of_a_sweep_are_not() -> None:
    given = config(
        *(
            "hydra.searchpath=[file://own]",
            "+hydra.job.env_set.A=b",
            "hydra.sweep.dir=x",
            "hydra/sweeper=optuna",
        ),
        *(
            "hydra.sweeper.n_trials=3",
            "hydra/launcher=submitit_slurm",
            "hydra.launcher.partition=gpu",
        ),
        *("hydra.mode=MULTIRUN", "hydra.run.dir=y"),
    )
    assert passing.of_hydra_for_points(given) == [
        "hydra.searchpath=[file://own]",
        "+hydra.job.env_set.A=b",
    ]
    assert passing.of_hydra_for_launcher(given) == [
        *("hydra.sweep.dir=x", "hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu")
    ]


def test_folders_of_configs_are_named_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    usual = Path("/relloc/conf")
    given = config(sources=(("main", "/relloc/conf"), ("command-line", str(tmp_path / "own"))))
    folders = passing.folders_of_configs(given, usual)
    assert passing.options(given, "train", folders) == [f"--config-dir={tmp_path}/own"]
    given = config(name="mine", sources=(("main", str(tmp_path / "main")),))
    folders = passing.folders_of_configs(given, usual)
    assert passing.options(given, "train", folders) == [
        f"--config-path={tmp_path}/main",
        "--config-name=mine",
    ]


def test_the_command_is_the_one_that_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/x/relloc/evaluate.py"])
    assert passing.command_of(config(job="mine")) == "evaluate"
    monkeypatch.setattr("sys.argv", ["other.py"])
    assert passing.command_of(config(job="train")) == "train"


@pytest.mark.parametrize("name", ["gaps", "2026_11_29", "1e3", "a=1", "it's", "a b"])
def test_a_point_that_is_sent_again_names_its_sweep_as_it_is_called(name: str) -> None:
    launcher = ProcessLauncher(OmegaConf.create({"processes": 1}))
    launcher.config, launcher._kind = config(), "train"
    launcher.config.sweep = name
    *_, word = launcher._resend(["seed=0"], [])
    (read,) = command_line.check([word], sweeps=True)
    assert read.value() == name
