"""What all launchers share: which points a sweep has, which are to be run, and what became of them."""

import json
import os
import sys
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from hydra_plugins.relloc_launchers.composing import Composing
from omegaconf import DictConfig, OmegaConf, open_dict

from relloc.errors import UsageError
from relloc.runs import data_of_run
from relloc.runs.launch import conf_dir, users_environment
from relloc.sweeps.mend import mend
from relloc.sweeps.points import Point, folder_of, identity, name_of
from relloc.sweeps.standing import Ask, Standing, standings
from relloc.sweeps.sweep import OWN_CONF, Sweep, snapshot
from relloc.sweeps.table import say, table, tell_failed


class PointsLauncher(Launcher):
    """Runs each point as a command of its own, in a folder of its own, from a copy of code and configs.

    A point that has finished is not run again, nor one that another command runs. One that failed
    changes nothing for the others; at the end a table says how all stand, and the exit code is 0
    only if all are done or in the hands of another command.
    """

    def __init__(self, settings: DictConfig) -> None:
        self.settings: dict[str, Any] = OmegaConf.to_container(settings, resolve=True)  # pyright: ignore[reportAttributeAccessIssue]
        self._beside = "[]"

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config = config
        self._composed: dict[tuple[str, ...], DictConfig] = {}
        self._compose = Composing(hydra_context.config_loader, config)
        # The sweeper composes every point to see whether it can be: it need not be done twice.
        hydra_context.config_loader.load_sweep_config = self._remembering  # pyright: ignore[reportAttributeAccessIssue]

    def _remembering(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        words = sweep_overrides
        if self.config.hydra.job.name == "evaluate":
            words = data_of_run.with_data(sweep_overrides, sys.argv[1:])
        composed = self._compose(master_config, words)
        self._composed[tuple(sweep_overrides)] = composed
        return composed

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        if "/" in str(self.config.sweep):
            raise UsageError(f"sweep={self.config.sweep} has a / in it: it names a folder in runs/sweeps")
        given = self._points(job_overrides)
        points = list({point.identity: point for point in given}.values())
        if len(points) < len(given):
            say(f"sweep   {len(given) - len(points)} points are others over again: each is run once")
        self.sweep = Sweep(Path(os.path.abspath(self.config.hydra.sweep.dir)))
        with self.sweep.locked():
            before = standings(points, self.schedulers())
            todo = [point for point, now in zip(points, before, strict=True) if is_to_run(point, now)]
            self._say_what(points, before, todo)
            self.code = self._snapshot() if todo else None
            try:
                self.plan(todo)
            except (UsageError, SystemExit):
                self.sweep.leave_nothing()
                raise
            # Before anything is started: what is started has to be found again.
            self.sweep.add(points, sys.argv)
            self.start(todo)
        self.follow(todo)
        after = standings(points, self.schedulers())
        for words in mend(points, after):
            say(f"mended  {words}")
        say(table(points, after))
        tell_failed(points, after, self.sweep, self.log_of)
        if any(now.state not in ("done", "running", "waiting") for now in after):
            sys.exit(1)
        return [self._returned(overrides) for overrides in job_overrides]

    @abstractmethod
    def plan(self, todo: Sequence[Point]) -> None:
        """Look whether the settings are such that these can be started. Raises `UsageError` where they are not."""

    def start(self, todo: Sequence[Point]) -> None:
        """Submit all points, and note which job has each, while no other command looks what is to be run."""

    @abstractmethod
    def follow(self, todo: Sequence[Point]) -> None:
        """Return when no job of these points is left."""

    @abstractmethod
    def log_of(self, point: Point) -> Path | None:
        """The file that has the point's output."""

    def schedulers(self) -> Mapping[str, Ask]:
        """Who knows how jobs stand."""
        return {}

    def command(self, point: Point) -> list[str]:
        """The command that runs a point, and goes on with it."""
        return [sys.executable, "-P", *point.arguments]

    def environment(self) -> dict[str, str]:
        """The environment of a point's command: the code of the copy, and what is told of the sweep."""
        paths = [str(self.code), *filter(None, [os.environ.get("PYTHONPATH")])]
        told = {"PYTHONPATH": os.pathsep.join(paths), "RELLOC_SWEEP": self.sweep.name, "RELLOC_BESIDE": self._beside}
        own = Path(str(self.code), OWN_CONF)
        return {**users_environment(), **told, **({"RELLOC_CONF": str(own)} if own.is_dir() else {})}

    def _points(self, job_overrides: Sequence[Sequence[str]]) -> list[Point]:
        runs, kind = Path(os.path.abspath(self.config.runs)), self.config.hydra.job.name
        self._beside = json.dumps(_values(job_overrides).get("checkpoint", []))
        kept = [[word for word in overrides if not _is_of_launcher(word)] for overrides in job_overrides]
        swept = [key for key, found in _values(kept).items() if len(found) > 1]
        points = []
        for given, overrides in zip(job_overrides, kept, strict=True):
            config = self._resolved(given)
            mark, name = identity(config), name_of(overrides, swept, config["seed"])
            folder = folder_of(runs, kind, name, mark)
            words = (*overrides, *_searched(self.config))
            points.append(Point(kind=kind, name=name, overrides=tuple(words), identity=mark, folder=folder))
        return points

    def _resolved(self, overrides: Sequence[str]) -> dict[str, Any]:
        composed = self._composed.pop(tuple(overrides), None)
        config = composed if composed is not None else self._remembering(self.config, list(overrides))
        HydraConfig.instance().set_config(config)
        with open_dict(config):
            del config["hydra"]
        return OmegaConf.to_container(config, resolve=True)  # pyright: ignore[reportReturnType]

    def _say_what(self, points: Sequence[Point], before: Sequence[Standing], todo: Sequence[Point]) -> None:
        done = sum(point not in todo and now.state == "done" for point, now in zip(points, before, strict=True))
        words = [f"{len(points)} points"]
        words += [f"{done} done before"] if done else []
        words += [f"{count} in flight already"] if (count := len(points) - done - len(todo)) else []
        say(f"sweep   {self.sweep.folder}: {', '.join(words)}, {len(todo)} to run")

    def _snapshot(self) -> Path:
        package = Path(sys.modules["relloc"].__file__ or "").parent
        own = Path(os.environ.get("RELLOC_CONF", "").removeprefix("file://"))
        plugins, own_conf = Path(__file__).parent, own if own.name else None
        return snapshot(self.sweep.folder, package=package, conf=conf_dir(), plugins=plugins, own=own_conf)

    def _returned(self, overrides: Sequence[str]) -> JobReturn:
        returned = JobReturn(overrides=overrides, status=JobStatus.COMPLETED)
        returned.return_value = None
        return returned


def is_to_run(point: Point, now: Standing) -> bool:
    """Whether nobody runs the point, and it is not done."""
    # Evaluations look for themselves which results there are: the checkpoint they name may be another one by now.
    return not now.in_flight and (now.state != "done" or point.kind != "train")


def _is_of_launcher(word: str) -> bool:
    return word.lstrip("+~").startswith(("launcher=", "launcher.", "sweep="))


def _values(job_overrides: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """What each setting is in any of the points."""
    values: dict[str, list[str]] = {}
    for overrides in job_overrides:
        for word in overrides:
            key, _, value = word.partition("=")
            found = values.setdefault(key.lstrip("+~"), [])
            found += [value] if value not in found else []
    return values


def _searched(config: DictConfig) -> list[str]:
    return [word for word in config.hydra.overrides.hydra if word.lstrip("+").startswith("hydra.searchpath=")]
