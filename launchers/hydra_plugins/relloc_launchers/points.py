"""The base class of all launchers.

It decides which points a sweep has and which of them are to be run, and reports how they ended.
"""

import dataclasses
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
from hydra_plugins.relloc_launchers import passing
from hydra_plugins.relloc_launchers.composing import Composing
from hydra_plugins.relloc_launchers.objective import (
    check_names,
    check_sweeper,
    is_search,
    names_of,
    objective_of,
)
from omegaconf import DictConfig, OmegaConf, open_dict

from relloc.errors import Interrupted, UsageError
from relloc.runs import data_of_run
from relloc.runs.command_line import as_value
from relloc.runs.explaining import check_evaluations
from relloc.runs.settings import EVALUATING_COMMANDS, conf_dir, resolved
from relloc.runs.start_command import refuse_chdir, users_environment
from relloc.status import Status
from relloc.sweeps.point_status import (
    PointStatus,
    StatesFunction,
    point_statuses_and_problems,
    repair_status,
    states_functions,
)
from relloc.sweeps.points import Point, folder_of, identity_of, name_of
from relloc.sweeps.sweep import Sweep, check_folder, check_name, code_and_configs, lock_of
from relloc.sweeps.table import (
    print_failed_points,
    print_message,
    print_next,
    print_silent_schedulers,
    reason_of,
    table,
)
from relloc.terminal import quantity

_RELLOC_CONF = "RELLOC_CONF"
_SCRATCH = "${scratch:}"  # a temporary folder, see relloc.runs.start_command
CONFIG_FILE = "multirun.yaml"  # Hydra's record of the command
_LISTED = 10  # points that can't be run, in a message


@dataclasses.dataclass(frozen=True, kw_only=True)
class Composed:
    """A point with its config, unresolved and resolved."""

    point: Point
    config: DictConfig
    resolved: dict[str, Any]


class PointsLauncher(Launcher):
    """Runs each point as a command with a folder of its own, from a copy of code and configs.

    Everything that can be refused is refused before anything is written. A point that has finished
    is not run again, and neither is one that another command is running. A point that fails changes
    nothing for the others. At the end a table shows the status of all points, and the exit code is
    0 only if all are done or run by another command.
    """

    # Whether points run as jobs of a scheduler, to which each can be submitted again by itself
    submits_to_scheduler = True
    # Whether a config file may choose the launcher. Points compose the same files.
    may_be_chosen_in_files = True

    def __init__(self, settings: DictConfig) -> None:
        self.settings: dict[str, Any] = OmegaConf.to_container(settings, resolve=True)  # pyright: ignore[reportAttributeAccessIssue]
        self._checkpoints_of_sweep = "[]"
        self._folders: dict[str, Path] = {}

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        # What can be refused before the points are known
        passing.refuse_swept(config)
        check_name(config.sweep)
        refuse_chdir(config.hydra)
        check_sweeper(config)
        runs = Path(os.path.abspath(config.runs))
        folder = Path(os.path.abspath(config.hydra.sweep.dir))
        check_folder(folder, runs)
        self.sweep = Sweep(folder, lock_of(runs))
        # Also checks that the note of the sweep can be read
        self.sweep.check_version()
        self.config = config
        self._kind = passing.command_of(config)
        self._folders = passing.folders_of_configs(config, conf_dir())
        self._composed: dict[tuple[str, ...], DictConfig] = {}
        self._compose = Composing(hydra_context.config_loader, config)
        # The sweeper composes every point to see whether that is possible. The results are kept, so
        # that no point is composed twice.
        hydra_context.config_loader.load_sweep_config = self._composed_once  # pyright: ignore[reportAttributeAccessIssue]
        # Sweepers write into this folder before any point is checked. With a temporary one, a sweep
        # that is refused leaves nothing behind.
        config.hydra.sweep.dir = _SCRATCH

    def _composed_once(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """Composes a point, and keeps the config until `_composed_from` asks for it."""
        words = sweep_overrides
        # An evaluation takes over the data set of the run that it evaluates.
        if self._kind in EVALUATING_COMMANDS:
            words = data_of_run.with_data(sweep_overrides, sys.argv[1:])
        composed = self._compose(master_config, words)
        self._composed[tuple(sweep_overrides)] = composed
        return composed

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        given = self._points(job_overrides)
        # Points with equal settings are one point: of several, the last one's words are used.
        composed = list({one.point.identity: one for one in given}.values())
        points = [one.point for one in composed]
        n_repeated = len(given) - len(points)
        if n_repeated:
            repeated = quantity(
                n_repeated, "point is another over again", "points are others over again"
            )
            print_message(f"sweep   {repeated}: each is run once")

        # Refuse what can be refused, before anything is written.
        content = self._content()
        self.code = self.sweep.copy_folder(content)
        before = self._point_statuses(points)
        todo = to_run(before)
        self._print_counts(before, todo)
        self._check([one for one in composed if one.point in todo])
        # A dry run ends in `plan`, or here if it had nothing to show.
        self.plan(todo)
        if self.settings.get("dry_run"):
            sys.exit(0)

        try:
            with self.sweep.locked():
                # Another command may have taken points before this one had the lock.
                todo = to_run(self._point_statuses(points))
                self.code = self.sweep.copy(content) if todo else None
                self.plan(todo)
                # Note the points before any is started, so that every running one can be found.
                self.sweep.add(points, sys.argv)
                self._write_config()
                self.start(todo)
        except (UsageError, OSError, SystemExit):
            self.sweep.leave_nothing()
            raise
        self.follow(todo)

        after = self._report_end(points)
        # A sweeper that searches gets a number for each point.
        if names_of(self.config):
            by_identity = {one.point.identity: one for one in after}
            return [self._returned(one, by_identity[one.point.identity]) for one in given]
        if not all(one.in_flight or one.status is Status.DONE for one in after):
            sys.exit(1)
        return [
            JobReturn(overrides=list(one.point.overrides), status=JobStatus.COMPLETED)
            for one in given
        ]

    @abstractmethod
    def plan(self, todo: Sequence[Point]) -> None:
        """Checks that these points can be started with the launcher's settings.

        It is called twice, before and after the sweep is locked, and writes nothing.

        Raises:
            UsageError: a setting is wrong.
            SystemExit: this is a dry run, and nothing is to be started.
        """

    def start(self, todo: Sequence[Point]) -> None:
        """Submits all points and notes the job of each, while the sweep is locked."""

    @abstractmethod
    def follow(self, todo: Sequence[Point]) -> None:
        """Returns when no job of these points is left."""

    @abstractmethod
    def log_of(self, point: Point) -> Path | None:
        """Returns the file with the output of a point, or None if there is none yet."""

    def states_functions(self) -> Mapping[str, StatesFunction]:
        """Returns the functions that ask for the states of jobs, by the name of their scheduler.

        All schedulers are included, since another launcher may have started some of the points.
        """
        return states_functions()

    def command(self, point: Point) -> list[str]:
        """Returns the command that runs a point or, if it was stopped, goes on with it.

        It uses the sweep's copies of the folders of configs.
        """
        folders = {}
        for option, original in self._folders.items():
            copy = self._copy_of(option)
            folders[option] = copy if copy.is_dir() else original
        own = [f"{option}={folder}" for option, folder in folders.items()]
        replaced = tuple(f"{option}=" for option in folders)
        others = [word for word in point.options if not word.startswith(replaced)]
        *words, folder = dataclasses.replace(point, options=(*own, *others)).arguments
        # A point composes the files that chose the launcher: it must not launch itself again.
        alone = [passing.RUN_ALONE] if self.may_be_chosen_in_files else []
        return [sys.executable, "-P", *words, *alone, folder]

    def environment(self) -> dict[str, str]:
        """Returns the environment of a point's command: the sweep's copy of the code, and its name.

        RELLOC_SWEEP_CHECKPOINTS lists the checkpoints of all points, in JSON.
        """
        paths = [str(self.code)]
        if os.environ.get("PYTHONPATH"):
            paths.append(os.environ["PYTHONPATH"])
        variables = {
            "PYTHONPATH": os.pathsep.join(paths),
            "RELLOC_SWEEP": self.sweep.name,
            "RELLOC_SWEEP_CHECKPOINTS": self._checkpoints_of_sweep,
        }
        own = self._copy_of(_RELLOC_CONF)
        if own.is_dir():
            variables[_RELLOC_CONF] = str(own)
        return {**users_environment(), **variables}

    def _copy_of(self, named_by: str) -> Path:
        """Returns the copy of the folder of configs that an option or variable names."""
        return Path(str(self.code), _name_of_copy(named_by))

    def _points(self, job_overrides: Sequence[Sequence[str]]) -> list[Composed]:
        """Composes the points, and decides on their names and run folders.

        Raises:
            UsageError: a setting belongs to an evaluation that a point does not choose.
        """
        runs = Path(os.path.abspath(self.config.runs))
        self._checkpoints_of_sweep = json.dumps(passing.values(job_overrides).get("checkpoint", []))
        words_of_points = [passing.of_points(overrides) for overrides in job_overrides]
        # A point is named by the settings that differ between points.
        all_values = passing.values(words_of_points)
        swept = [key for key, values in all_values.items() if len(values) > 1]
        # A search gives one point at a time: what it chose does not stand on the command line.
        if is_search(self.config):
            chosen = [passing.chosen(words, self.config) for words in words_of_points]
            swept += passing.values(chosen)
        of_hydra = passing.of_hydra_for_points(self.config)
        options = passing.options(self.config, self._kind, self._folders)
        composed = []
        for given, overrides in zip(job_overrides, words_of_points, strict=True):
            config, launcher = self._composed_from(given)
            # Values that nothing uses make no points: they are refused before equal points, and
            # those that were run before, are left out.
            check_evaluations(overrides, config)
            settings = resolved(config)
            identity = identity_of(settings)
            name = name_of(overrides, swept, settings["seed"])
            # A launcher that a preset chose would submit the point once more.
            is_by_preset = launcher != "here" and not passing.names_launcher(given)
            here = ["launcher=here"] if is_by_preset else []
            point = Point(
                kind=self._kind,
                name=name,
                overrides=(*overrides, *of_hydra),
                identity=identity,
                folder=folder_of(runs, self._kind, name, identity),
                options=(*options, *here),
                cwd=os.getcwd(),
                resend=self._resend(given, options) if self.submits_to_scheduler else (),
            )
            composed.append(Composed(point=point, config=config, resolved=settings))
        return composed

    def _resend(self, given: Sequence[str], options: Sequence[str]) -> tuple[str, ...]:
        """Returns the words after `python` that submit one point of this sweep again."""
        named = [word for word in given if not word.startswith("sweep=")]
        of_hydra = [
            *passing.of_hydra_for_points(self.config),
            *passing.of_hydra_for_launcher(self.config),
        ]
        command = ("-m", f"relloc.{self._kind}", *options, "--multirun")
        return (*command, *named, *of_hydra, f"sweep={as_value(str(self.config.sweep))}")

    def _composed_from(self, overrides: Sequence[str]) -> tuple[DictConfig, str]:
        """Returns a point's config without Hydra's part, and the launcher that it chooses."""
        config = self._composed.pop(tuple(overrides), None)
        if config is None:
            config = self._composed_once(self.config, list(overrides))
        # Interpolations may name settings of Hydra, of which each point has its own.
        HydraConfig.instance().set_config(config)
        launcher = str(config.hydra.runtime.choices.get("launcher"))
        with open_dict(config):
            del config["hydra"]
        return config, launcher

    def _check(self, todo: Sequence[Composed]) -> None:
        """Raises `UsageError` with the points that can't be run, and why."""
        if not todo:
            return
        from relloc.runs.build import refusals  # torch loads here

        setup = [str(line) for line in self.settings.get("setup") or []]
        for one in todo:
            check_names(one.config, self._kind)
        reasons = refusals(self._kind, [one.config for one in todo], setup)
        refused = []
        for one, reason in zip(todo, reasons, strict=True):
            if reason:
                refused.append((one.point.name, reason))
        if not refused:
            return
        if len(todo) == 1:
            raise UsageError(refused[0][1])
        lines = [f"{len(refused)} of {len(todo)} points can't be run, so that none was started:"]
        lines += [f"  {name}: {reason}" for name, reason in refused[:_LISTED]]
        if len(refused) > _LISTED:
            lines.append(f"  and {len(refused) - _LISTED} more")
        raise UsageError("\n".join(lines))

    def _point_statuses(self, points: Sequence[Point]) -> list[PointStatus]:
        """Returns the status of each point.

        Raises:
            Interrupted: a scheduler did not answer, so that starting a point might run it twice.
        """
        statuses, silent = point_statuses_and_problems(points, self.states_functions())
        if any(one.status is Status.UNKNOWN for one in statuses):
            raise Interrupted(
                f"{silent[0]}. Points may have jobs there, and none is to run twice: "
                "try again later"
            )
        return statuses

    def _report_end(self, points: Sequence[Point]) -> list[PointStatus]:
        """Prints how the points ended, and returns their status."""
        statuses, silent = point_statuses_and_problems(points, self.states_functions())
        after = self.sweep.with_cancelled(statuses)
        for message in repair_status(after):
            print_message(f"repaired  {message}")
        print_message(table(after))
        print_failed_points(after, self.log_of)
        print_silent_schedulers(after, silent)
        print_next(self.sweep)
        return after

    def _print_counts(self, before: Sequence[PointStatus], todo: Sequence[Point]) -> None:
        """Prints how many points there are, and how many are left to run."""
        n_done = sum(one.point not in todo and one.status is Status.DONE for one in before)
        n_in_flight = len(before) - n_done - len(todo)
        counts = [quantity(len(before), "point")]
        if n_done:
            counts.append(f"{n_done} done before")
        if n_in_flight:
            counts.append(f"{n_in_flight} in flight already")
        counts.append(f"{len(todo)} to run")
        print_message(f"sweep   {self.sweep.folder}: {', '.join(counts)}")

    def _content(self) -> dict[str, bytes]:
        """Returns the files of the code and configs as they are now, for the sweep's copy."""
        package = Path(sys.modules["relloc"].__file__ or "").parent
        named = {_name_of_copy(option): folder for option, folder in self._folders.items()}
        own = Path(os.environ.get(_RELLOC_CONF, "").removeprefix("file://"))
        if own.name and own.is_dir():
            named[_name_of_copy(_RELLOC_CONF)] = own
        return code_and_configs(
            package=package, conf=conf_dir(), plugins=Path(__file__).parent, own=named
        )

    def _write_config(self) -> None:
        """Writes Hydra's record of the command into the sweep's folder.

        Sweepers write it into the temporary folder that `setup` gave them.
        """
        self.config.hydra.sweep.dir = str(self.sweep.folder)
        OmegaConf.save(self.config, self.sweep.folder / CONFIG_FILE)

    def _returned(self, one: Composed, end: PointStatus) -> JobReturn:
        """Returns to a sweeper that searches the number of a point, or that the point failed.

        Raises `SystemExit` for a point that was stopped or that another command runs, since the
        search can't go on without its number.
        """
        returned = JobReturn(overrides=list(one.point.overrides), working_dir=str(one.point.folder))
        if end.status is Status.DONE:
            returned.status = JobStatus.COMPLETED
            returned.return_value = objective_of(one.point.folder, names_of(self.config))
        elif end.status is Status.FAILED:
            returned.status = JobStatus.FAILED
            reason = reason_of(self.log_of(one.point))
            returned.return_value = UsageError(f"point {one.point.name} failed: {reason}")
        else:
            status = end.status.word
            print_message(
                f"sweep   point {one.point.name} is {status}: the search ends, "
                "and the same command goes on with it"
            )
            sys.exit(1)
        return returned


def _name_of_copy(named_by: str) -> str:
    """Returns the name of a folder's copy: own_conf_config_dir for what --config-dir names."""
    return "own_conf_" + named_by.lstrip("-").lower().replace("-", "_")


def to_run(statuses: Sequence[PointStatus]) -> list[Point]:
    """Returns the points that nobody runs and that are not done.

    An evaluation is never taken to be done, since its checkpoint may have changed: it looks for
    itself which results there are already.
    """
    points = []
    for one in statuses:
        is_done = one.status is Status.DONE and one.point.kind == "train"
        if not one.in_flight and not is_done:
            points.append(one.point)
    return points
