"""`hydra/launcher=submitit_slurm` and `submitit_local` with that plugin's settings, run by relloc's own launchers.

hydra-submitit-launcher sends Hydra itself to the jobs, where it composes a point only when its job begins. Its
settings are taken as it documents them; points are commands, as with launcher=slurm and launcher=local.
"""

import dataclasses
import difflib
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import HydraContext, TaskFunction
from hydra_plugins.hydra_submitit_launcher.config import LocalQueueConf, SlurmQueueConf
from hydra_plugins.relloc_launchers.processes import ProcessLauncher
from hydra_plugins.relloc_launchers.slurm import SlurmLauncher
from omegaconf import DictConfig, OmegaConf

from relloc.checks import whole
from relloc.errors import UsageError
from relloc.sweeps.points import Point
from relloc.sweeps.table import say

_PREFIX = "hydra.launcher."
# Settings of that plugin that launcher=slurm has by the same name and with the same meaning
_SAME = (
    *(
        "partition",
        "account",
        "qos",
        "constraint",
        "exclude",
        "gres",
        "nodes",
        "gpus_per_node",
        "tasks_per_node",
    ),
    *(
        "cpus_per_task",
        "mem_gb",
        "timeout_min",
        "signal_delay_s",
        "max_num_timeout",
        "array_parallelism",
    ),
    "additional_parameters",
)
_LISTS = ("setup", "srun_args")
_SPECIAL = ("name", "submitit_folder", "dry_run", "mode")


@dataclasses.dataclass
class SubmititSlurmSettings(SlurmQueueConf):
    """The plugin's own settings, for relloc's launcher."""

    _target_: str = "hydra_plugins.relloc_launchers.submitit_settings.SubmititSlurmLauncher"
    mode: str = "MULTIRUN"  # of Hydra: a single run is submitted as well, as with launcher=slurm
    timeout_min: int | None = 60  # pyright: ignore[reportIncompatibleVariableOverride]


@dataclasses.dataclass
class SubmititLocalSettings(LocalQueueConf):
    """The same for processes of this machine, which have no limit of time unless one is given."""

    _target_: str = "hydra_plugins.relloc_launchers.submitit_settings.SubmititLocalLauncher"
    mode: str = "MULTIRUN"
    timeout_min: int | None = None  # pyright: ignore[reportIncompatibleVariableOverride]


class SubmititMembers(SearchPathPlugin):
    """Puts relloc's launchers in the place of that plugin's, as hydra/launcher=submitit_slurm and submitit_local.

    Hydra calls this once it has imported all plugins, in whatever order it found them.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        store = ConfigStore.instance().store
        for name, settings in (("slurm", SubmititSlurmSettings), ("local", SubmititLocalSettings)):
            store(group="hydra/launcher", name=f"submitit_{name}", node=settings, provider="relloc")


class SubmititSlurmLauncher(SlurmLauncher):
    """Points as SLURM jobs, with the settings of hydra/launcher=submitit_slurm."""

    asked_by = "hydra/launcher=submitit_slurm"
    prefix = _PREFIX

    def __init__(self, **settings: Any) -> None:
        given = _plain(settings)
        super().__init__(OmegaConf.create(_of_slurm(given)))
        self._given_folder, self._job_name = Path(given["submitit_folder"]), given["name"]

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        _refuse_two_launchers(config, self.asked_by)

    def plan(self, todo: Sequence[Point]) -> None:
        from submitit.core.utils import JobPaths

        # Submissions have folders of their own, below the part of it that doesn't depend on a job's number.
        self._log_folder = JobPaths.get_first_id_independent_folder(self._given_folder)
        super().plan(todo)
        gpus, tasks = self.settings["gpus_per_node"], self.settings["tasks_per_node"]
        if todo and isinstance(gpus, int) and gpus > 1 and tasks == 1:
            say(
                f"        a process trains on one GPU: {gpus - 1} of {_PREFIX}gpus_per_node={gpus} stay unused unless "
                f"{_PREFIX}tasks_per_node={gpus} as well"
            )


class SubmititLocalLauncher(ProcessLauncher):
    """Points as processes of this machine, with the settings of hydra/launcher=submitit_local."""

    may_be_chosen_in_files = True

    def __init__(self, **settings: Any) -> None:
        super().__init__(OmegaConf.create({"processes": "auto"}))
        self._given = _plain(settings)

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        _refuse_two_launchers(config, "hydra/launcher=submitit_local")
        self._plain_name = config.hydra.job.name
        self._plain_folder = f"{config.hydra.sweep.dir}/.submitit/%j"

    def plan(self, todo: Sequence[Point]) -> None:
        given = dict(self._given)
        known = [field.name for field in dataclasses.fields(SubmititLocalSettings)]
        _refuse_unknown(given, known, "submitit_local")
        self._limit_s = None
        if (limit := given["timeout_min"]) is not None:
            self._limit_s = 60 * whole(f"{_PREFIX}timeout_min", limit)
        self._threads = given["cpus_per_task"]
        if self._threads is not None:
            whole(f"{_PREFIX}cpus_per_task", self._threads)
        self._has_gpus = given["gpus_per_node"] != 0
        self._started: dict[subprocess.Popen[bytes], float] = {}
        meaningless = {
            "nodes": given["nodes"] != 1,
            "tasks_per_node": given["tasks_per_node"] != 1,
            "gpus_per_node": given["gpus_per_node"] not in (None, 0, 1),
            "mem_gb": given["mem_gb"] is not None,
            "name": given["name"] != self._plain_name,
            "submitit_folder": given["submitit_folder"] != self._plain_folder,
        }
        for name, is_given in meaningless.items():
            if is_given:
                raise UsageError(
                    f"{_PREFIX}{name}={given[name]} means nothing with hydra/launcher=submitit_local: each point is a "
                    "process of this machine, with one GPU where there are some and its output in the sweep's logs/"
                )
        super().plan(todo)

    def environment(self) -> dict[str, str]:
        made = super().environment()
        if self._threads is not None:
            made["OMP_NUM_THREADS"] = str(self._threads)
        return made if self._has_gpus else made | {"CUDA_VISIBLE_DEVICES": ""}

    def _collect(self) -> None:
        super()._collect()
        if self._limit_s is None:
            return
        now = time.monotonic()
        for process, (point, _) in self._running.items():
            began = self._started.setdefault(process, now)
            if now - began > self._limit_s and began < float("inf"):
                say(f"time    {point.name} has reached {_PREFIX}timeout_min: it saves and ends")
                self._started[process] = float("inf")
                process.send_signal(signal.SIGUSR2)


def _of_slurm(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of that plugin, by the names of launchers/conf/slurm.yaml. Raises `UsageError`."""
    from submitit import SlurmExecutor

    known = {field.name for field in dataclasses.fields(SubmititSlurmSettings)}
    of_submitit = SlurmExecutor._valid_parameters() | {"srun_args"}
    _refuse_unknown(given, sorted(known | of_submitit | {"dry_run"}), "submitit_slurm")
    others = [name for name in given if name not in (*_SAME, *_LISTS, *_SPECIAL)]
    return {
        **{name: given[name] for name in _SAME},
        **{name: given.get(name) or [] for name in _LISTS},
        "dry_run": given.get("dry_run", False),
        "submitit": {
            name: given[name]
            for name in others
            if given[name] is not None and not _is_no_flag(given, name)
        },
    }


def _is_no_flag(given: Mapping[str, Any], name: str) -> bool:
    """Whether it is an option of sbatch that is not wanted, which submitit would write as --exclusive=False."""
    return name == "exclusive" and given[name] is False


def _refuse_unknown(given: Mapping[str, Any], known: Sequence[str], launcher: str) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = (
                f"Did you mean {_PREFIX}{near[0]}?"
                if near
                else f"It has {', '.join(sorted(known))}"
            )
            raise UsageError(f"hydra/launcher={launcher} has no setting {_PREFIX}{name}. {hint}")


def _refuse_two_launchers(config: DictConfig, asked_by: str) -> None:
    if "sweep" not in config:
        raise UsageError(
            f"{asked_by} is for trainings and evaluations: relloc.{config.hydra.job.name} runs here"
        )
    chosen = config.hydra.runtime.choices.get("launcher")
    if chosen not in (None, "here"):
        raise UsageError(f"launcher={chosen} and {asked_by} are two launchers: give one")


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        for name, value in settings.items()
    }
