"""What all launchers share: which points a sweep has, which are to be run, and what became of them."""

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
from relloc.runs.launch import refuse_chdir, users_environment
from relloc.runs.settings import conf_dir
from relloc.status import Status
from relloc.sweeps.points import Point, folder_of, identity, name_of
from relloc.sweeps.standing import Ask, Standing, known_standings, repair_status, schedulers
from relloc.sweeps.sweep import Sweep, check_folder, check_name, code_and_configs, lock_of
from relloc.sweeps.table import reason_of, say, table, tell_failed, tell_next, tell_silent

_RELLOC_CONF = "RELLOC_CONF"
_SCRATCH = "${scratch:}"  # a folder that is removed at the end
CONFIG_FILE = "multirun.yaml"  # Hydra's record of the command
_NAMED = 10  # points that can't be run, in a message


@dataclasses.dataclass(frozen=True, kw_only=True)
class Composed:
    """A point with its config, and the same resolved."""

    point: Point
    config: DictConfig
    resolved: dict[str, Any]


class PointsLauncher(Launcher):
    """Runs each point as a command of its own, in a folder of its own, from a copy of code and configs.

    Everything that can be refused is refused before anything is written. A point that has finished is not run again,
    nor one that another command runs. One that failed changes nothing for the others; at the end a table says how all
    stand, and the exit code is 0 only if all are done or in the hands of another command.
    """

    sends_away = True  # whether points run under a scheduler, to which they can be sent again
    may_be_chosen_in_files = True  # which points compose as well

    def __init__(self, settings: DictConfig) -> None:
        self.settings: dict[str, Any] = OmegaConf.to_container(settings, resolve=True)  # pyright: ignore[reportAttributeAccessIssue]
        self._beside = "[]"
        self._folders: dict[str, Path] = {}

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        passing.refuse_swept(config)
        check_name(config.sweep)
        refuse_chdir(config.hydra)
        check_sweeper(config)
        runs, folder = (
            Path(os.path.abspath(name)) for name in (config.runs, config.hydra.sweep.dir)
        )
        check_folder(folder, runs)
        self.sweep = Sweep(folder, lock_of(runs))
        self.sweep.check_version()  # and that its note can be read
        self.config = config
        self._kind = passing.command_of(config)
        self._folders = passing.folders_of_configs(config, conf_dir())
        self._composed: dict[tuple[str, ...], DictConfig] = {}
        self._compose = Composing(hydra_context.config_loader, config)
        # The sweeper composes every point to see whether it can be: it need not be done twice.
        hydra_context.config_loader.load_sweep_config = self._remembering  # pyright: ignore[reportAttributeAccessIssue]
        # Sweepers write into this folder before a point was looked at: a sweep that is refused leaves nothing.
        config.hydra.sweep.dir = _SCRATCH

    def _remembering(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        words = sweep_overrides
        if self.config.hydra.job.name == "evaluate":
            words = data_of_run.with_data(sweep_overrides, sys.argv[1:])
        composed = self._compose(master_config, words)
        self._composed[tuple(sweep_overrides)] = composed
        return composed

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        given = self._points(job_overrides)
        composed = list({one.point.identity: one for one in given}.values())
        points = [one.point for one in composed]
        if len(points) < len(given):
            say(
                f"sweep   {len(given) - len(points)} points are others over again: each is run once"
            )
        content = self._content()
        self.code = self.sweep.place_of(content)
        before = self._standings(points)
        todo = to_run(before)
        self._say_what(before, todo)
        self._check([one for one in composed if one.point in todo])
        self.plan(todo)  # where a dry run ends: nothing was written yet
        if self.settings.get("dry_run"):  # and where it had nothing to show
            sys.exit(0)
        try:
            with self.sweep.locked():
                # Another command may have taken points meanwhile.
                todo = to_run(self._standings(points))
                self.code = self.sweep.copy(content) if todo else None
                self.plan(todo)
                # Before anything is started: what is started has to be found again.
                self.sweep.add(points, sys.argv)
                self._write_config()
                self.start(todo)
        except (UsageError, OSError, SystemExit):
            self.sweep.leave_nothing()
            raise
        self.follow(todo)
        after = self._tell_end(points)
        of_identity = {now.point.identity: now for now in after}
        if names_of(self.config):
            return [self._returned(one, of_identity[one.point.identity]) for one in given]
        if not all(now.in_flight or now.status is Status.DONE for now in after):
            sys.exit(1)
        return [
            JobReturn(overrides=list(one.point.overrides), status=JobStatus.COMPLETED)
            for one in given
        ]

    @abstractmethod
    def plan(self, todo: Sequence[Point]) -> None:
        """Look whether the settings are such that these can be started; called twice, and writes nothing.

        Raises `UsageError` where they are not, and `SystemExit` where nothing is to be started.
        """

    def start(self, todo: Sequence[Point]) -> None:
        """Submit all points, and note which job has each, while no other command looks what is to be run."""

    @abstractmethod
    def follow(self, todo: Sequence[Point]) -> None:
        """Return when no job of these points is left."""

    @abstractmethod
    def log_of(self, point: Point) -> Path | None:
        """The file that has the point's output."""

    def schedulers(self) -> Mapping[str, Ask]:
        """Who knows how jobs stand: also of points that another launcher began."""
        return {name: scheduler.states for name, scheduler in schedulers().items()}

    def command(self, point: Point) -> list[str]:
        """The command that runs a point, and goes on with it: with the copies of the folders of configs."""
        copies = {option: self._copy_of(option) for option in self._folders}
        copies = {
            option: copy if copy.is_dir() else self._folders[option]
            for option, copy in copies.items()
        }
        named = [
            word
            for word in point.options
            if not word.startswith(tuple(f"{option}=" for option in copies))
        ]
        own = tuple(f"{option}={folder}" for option, folder in copies.items())
        *words, folder = dataclasses.replace(point, options=(*own, *named)).arguments
        # A launcher that a file chose, which the point composes as well, must not launch it again.
        return [
            sys.executable,
            "-P",
            *words,
            *([passing.RUN_ALONE] if self.may_be_chosen_in_files else []),
            folder,
        ]

    def environment(self) -> dict[str, str]:
        """The environment of a point's command: the code of the copy, and what is told of the sweep."""
        paths = [str(self.code), *filter(None, [os.environ.get("PYTHONPATH")])]
        told = {
            "PYTHONPATH": os.pathsep.join(paths),
            "RELLOC_SWEEP": self.sweep.name,
            "RELLOC_BESIDE": self._beside,
        }
        own = self._copy_of(_RELLOC_CONF)
        return {**users_environment(), **told, **({_RELLOC_CONF: str(own)} if own.is_dir() else {})}

    def _copy_of(self, named_by: str) -> Path:
        """Where the copy has the folder of configs which that option, or environment variable, names."""
        return Path(str(self.code), _name_of_copy(named_by))

    def _points(self, job_overrides: Sequence[Sequence[str]]) -> list[Composed]:
        runs = Path(os.path.abspath(self.config.runs))
        self._beside = json.dumps(passing.values(job_overrides).get("checkpoint", []))
        kept = [passing.of_points(overrides) for overrides in job_overrides]
        swept = [key for key, found in passing.values(kept).items() if len(found) > 1]
        if is_search(
            self.config
        ):  # it gives a point at a time, of which the command line says what stays
            swept += passing.values([passing.chosen(overrides, self.config) for overrides in kept])
        of_hydra = passing.of_hydra_for_points(self.config)
        options = passing.options(self.config, self._kind, self._folders)
        found = []
        for given, overrides in zip(job_overrides, kept, strict=True):
            config, launcher = self._composed_from(given)
            resolved: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # pyright: ignore[reportAssignmentType]
            mark, name = identity(resolved), name_of(overrides, swept, resolved["seed"])
            # A launcher that a preset chose would have the point sent away once more.
            here = (
                ["launcher=here"]
                if launcher != "here" and not passing.names_launcher(given)
                else []
            )
            point = Point(
                kind=self._kind,
                name=name,
                overrides=(*overrides, *of_hydra),
                identity=mark,
                folder=folder_of(runs, self._kind, name, mark),
                options=(*options, *here),
                cwd=os.getcwd(),
                resend=self._resend(given, options) if self.sends_away else (),
            )
            found.append(Composed(point=point, config=config, resolved=resolved))
        return found

    def _resend(self, given: Sequence[str], options: Sequence[str]) -> tuple[str, ...]:
        """The words after `python` that make a point alone one of this sweep again."""
        named = [word for word in given if not word.startswith("sweep=")]
        of_hydra = [
            *passing.of_hydra_for_points(self.config),
            *passing.of_hydra_for_launcher(self.config),
        ]
        command = ("-m", f"relloc.{self._kind}", *options, "--multirun")
        return (*command, *named, *of_hydra, f"sweep={as_value(str(self.config.sweep))}")

    def _composed_from(self, overrides: Sequence[str]) -> tuple[DictConfig, str]:
        """A point's config without Hydra's part, and the launcher that it chooses."""
        composed = self._composed.pop(tuple(overrides), None)
        config = (
            composed if composed is not None else self._remembering(self.config, list(overrides))
        )
        HydraConfig.instance().set_config(config)
        launcher = str(config.hydra.runtime.choices.get("launcher"))
        with open_dict(config):
            del config["hydra"]
        return config, launcher

    def _check(self, todo: Sequence[Composed]) -> None:
        """Raises `UsageError` with the points that can't be run, of whatever number, and why."""
        if not todo:
            return
        from relloc.runs.build import refusals  # torch loads here

        setup = [str(line) for line in self.settings.get("setup") or []]
        for one in todo:
            check_names(one.config, self._kind)
        why = refusals(self._kind, [one.config for one in todo], setup)
        refused = [(one.point.name, told) for one, told in zip(todo, why, strict=True) if told]
        if not refused:
            return
        if len(todo) == 1:
            raise UsageError(refused[0][1])
        named = [f"  {name}: {told}" for name, told in refused[:_NAMED]]
        named += [f"  and {len(refused) - _NAMED} more"] if len(refused) > _NAMED else []
        raise UsageError(
            "\n".join(
                [
                    f"{len(refused)} of {len(todo)} points can't be run, so that none was started:",
                    *named,
                ]
            )
        )

    def _standings(self, points: Sequence[Point]) -> list[Standing]:
        found, silent = known_standings(points, self.schedulers())
        if any(now.status is Status.UNKNOWN for now in found):
            raise Interrupted(
                f"{silent[0]}. Points may have jobs there, and none is to run twice: try again later"
            )
        return found

    def _tell_end(self, points: Sequence[Point]) -> list[Standing]:
        found, silent = known_standings(points, self.schedulers())
        after = self.sweep.with_cancelled(found)
        for told in repair_status(after):
            say(f"mended  {told}")
        say(table(after))
        tell_failed(after, self.log_of)
        tell_silent(after, silent)
        tell_next(self.sweep)
        return after

    def _say_what(self, before: Sequence[Standing], todo: Sequence[Point]) -> None:
        done = sum(now.point not in todo and now.status is Status.DONE for now in before)
        told = [f"{len(before)} points"]
        told += [f"{done} done before"] if done else []
        told += [f"{count} in flight already"] if (count := len(before) - done - len(todo)) else []
        say(f"sweep   {self.sweep.folder}: {', '.join(told)}, {len(todo)} to run")

    def _content(self) -> dict[str, bytes]:
        """The code and configs of now."""
        package = Path(sys.modules["relloc"].__file__ or "").parent
        named = {_name_of_copy(option): folder for option, folder in self._folders.items()}
        own = Path(os.environ.get(_RELLOC_CONF, "").removeprefix("file://"))
        if own.name and own.is_dir():
            named[_name_of_copy(_RELLOC_CONF)] = own
        return code_and_configs(
            package=package, conf=conf_dir(), plugins=Path(__file__).parent, own=named
        )

    def _write_config(self) -> None:
        """Put Hydra's record of the command, which sweepers write elsewhere, into the sweep's folder."""
        self.config.hydra.sweep.dir = str(self.sweep.folder)
        OmegaConf.save(self.config, self.sweep.folder / CONFIG_FILE)

    def _returned(self, one: Composed, now: Standing) -> JobReturn:
        """What a sweeper that searches is told: the number, or that the point failed.

        Raises `SystemExit` for a point that was stopped or is another command's: no search goes on without it.
        """
        returned = JobReturn(overrides=list(one.point.overrides), working_dir=str(one.point.folder))
        if now.status is Status.DONE:
            returned.status = JobStatus.COMPLETED
            returned.return_value = objective_of(one.point.folder, names_of(self.config))
        elif now.status is Status.FAILED:
            returned.status = JobStatus.FAILED
            reason = reason_of(self.log_of(one.point))
            returned.return_value = UsageError(f"point {one.point.name} failed: {reason}")
        else:
            status = now.status.word
            say(
                f"sweep   point {one.point.name} is {status}: the search ends, and the same command goes on with it"
            )
            sys.exit(1)
        return returned


def _name_of_copy(named_by: str) -> str:
    return "own_conf_" + named_by.lstrip("-").lower().replace("-", "_")


def to_run(found: Sequence[Standing]) -> list[Point]:
    """Those that nobody runs and that are not done.

    Evaluations look for themselves which results there are: the checkpoint they name may be another one by now.
    """
    return [
        now.point
        for now in found
        if not now.in_flight and (now.status is not Status.DONE or now.point.kind != "train")
    ]
