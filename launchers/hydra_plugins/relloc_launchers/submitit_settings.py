"""Takes the settings of hydra-submitit-launcher and runs them with relloc's own launchers.

That plugin, chosen with `hydra/launcher=submitit_slurm` or `submitit_local`, sends Hydra itself to
the jobs, where a point is composed only when its job begins. Here its settings mean what it
documents, but points are commands, as with launcher=slurm and launcher=local.
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
from relloc.sweeps.table import print_message

_PREFIX = "hydra.launcher."
# Settings of that plugin that launcher=slurm has by the same name and with the same meaning
_SAME = (
    "partition",
    "account",
    "qos",
    "constraint",
    "exclude",
    "gres",
    "nodes",
    "gpus_per_node",
    "tasks_per_node",
    "cpus_per_task",
    "mem_gb",
    "timeout_min",
    "signal_delay_s",
    "max_num_timeout",
    "array_parallelism",
    "additional_parameters",
)
_LISTS = ("setup", "srun_args")
_SPECIAL = ("name", "submitit_folder", "dry_run", "mode")


@dataclasses.dataclass
class SubmititSlurmSettings(SlurmQueueConf):
    """The plugin's settings of SLURM jobs, for relloc's launcher."""

    _target_: str = "hydra_plugins.relloc_launchers.submitit_settings.SubmititSlurmLauncher"
    # Hydra's mode: a single run is submitted as well, as with launcher=slurm.
    mode: str = "MULTIRUN"
    timeout_min: int | None = 60  # pyright: ignore[reportIncompatibleVariableOverride]


@dataclasses.dataclass
class SubmititLocalSettings(LocalQueueConf):
    """The plugin's settings of local processes, by default without a time limit."""

    _target_: str = "hydra_plugins.relloc_launchers.submitit_settings.SubmititLocalLauncher"
    mode: str = "MULTIRUN"
    timeout_min: int | None = None  # pyright: ignore[reportIncompatibleVariableOverride]


class SubmititMembers(SearchPathPlugin):
    """Registers relloc's launchers as hydra/launcher=submitit_slurm and submitit_local.

    Hydra calls this after it has imported all plugins, so that these replace that plugin's own.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        store = ConfigStore.instance().store
        for name, settings in (("slurm", SubmititSlurmSettings), ("local", SubmititLocalSettings)):
            store(group="hydra/launcher", name=f"submitit_{name}", node=settings, provider="relloc")


class SubmititSlurmLauncher(SlurmLauncher):
    """Runs points as SLURM jobs, with the settings of hydra/launcher=submitit_slurm."""

    asked_by = "hydra/launcher=submitit_slurm"
    prefix = _PREFIX

    def __init__(self, **settings: Any) -> None:
        given = _plain(settings)
        super().__init__(OmegaConf.create(_of_slurm(given)))
        self._given_folder = Path(given["submitit_folder"])
        self._job_name = given["name"]

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        _refuse_two_launchers(config, self.asked_by)

    def plan(self, todo: Sequence[Point]) -> None:
        from submitit.core.utils import JobPaths

        # Each submission has a folder of its own below that part of the given folder which does not
        # depend on the job's number.
        self._log_folder = JobPaths.get_first_id_independent_folder(self._given_folder)
        super().plan(todo)
        gpus = self.settings["gpus_per_node"]
        tasks = self.settings["tasks_per_node"]
        if todo and isinstance(gpus, int) and gpus > 1 and tasks == 1:
            print_message(
                f"        a process trains on one GPU: {gpus - 1} of {_PREFIX}gpus_per_node={gpus} "
                f"stay unused unless {_PREFIX}tasks_per_node={gpus} as well"
            )


class SubmititLocalLauncher(ProcessLauncher):
    """Runs points as local processes, with the settings of hydra/launcher=submitit_local."""

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
        limit_min = given["timeout_min"]
        if limit_min is not None:
            self._limit_s = 60 * whole(f"{_PREFIX}timeout_min", limit_min)
        self._threads = given["cpus_per_task"]
        if self._threads is not None:
            whole(f"{_PREFIX}cpus_per_task", self._threads)
        self._has_gpus = given["gpus_per_node"] != 0
        self._started: dict[subprocess.Popen[bytes], float] = {}
        # Settings that ask for what a local process does not have
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
                    f"{_PREFIX}{name}={given[name]} means nothing with "
                    "hydra/launcher=submitit_local: each point is a process of this machine, with "
                    "one GPU where there are some and its output in the sweep's logs/"
                )
        super().plan(todo)

    def environment(self) -> dict[str, str]:
        made = super().environment()
        if self._threads is not None:
            made["OMP_NUM_THREADS"] = str(self._threads)
        if not self._has_gpus:
            made["CUDA_VISIBLE_DEVICES"] = ""
        return made

    def _collect(self) -> None:
        super()._collect()
        # Have points save and end when they reach the time limit.
        if self._limit_s is None:
            return
        now = time.monotonic()
        for process, (point, _) in self._running.items():
            began = self._started.setdefault(process, now)
            if now - began > self._limit_s and began < float("inf"):
                print_message(
                    f"time    {point.name} has reached {_PREFIX}timeout_min: it saves and ends"
                )
                # Marks that the process has been sent the signal
                self._started[process] = float("inf")
                process.send_signal(signal.SIGUSR2)


def _of_slurm(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the plugin's settings by the names of launchers/conf/slurm.yaml.

    Raises `UsageError` for settings that neither the plugin nor submitit has.
    """
    from submitit import SlurmExecutor

    known = {field.name for field in dataclasses.fields(SubmititSlurmSettings)}
    of_submitit = SlurmExecutor._valid_parameters() | {"srun_args"}
    _refuse_unknown(given, sorted(known | of_submitit | {"dry_run"}), "submitit_slurm")
    # All other settings go to submitit, except an unset flag, which submitit would write as
    # --exclusive=False.
    of_submitit_only = {}
    for name, value in given.items():
        is_unset_flag = name == "exclusive" and value is False
        is_other = name not in (*_SAME, *_LISTS, *_SPECIAL)
        if is_other and value is not None and not is_unset_flag:
            of_submitit_only[name] = value
    return {
        **{name: given[name] for name in _SAME},
        **{name: given.get(name) or [] for name in _LISTS},
        "dry_run": given.get("dry_run", False),
        "submitit": of_submitit_only,
    }


def _refuse_unknown(given: Mapping[str, Any], known: Sequence[str], launcher: str) -> None:
    """Raises `UsageError` for a setting that the launcher doesn't have."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"It has {', '.join(sorted(known))}"
            if near:
                hint = f"Did you mean {_PREFIX}{near[0]}?"
            raise UsageError(f"hydra/launcher={launcher} has no setting {_PREFIX}{name}. {hint}")


def _refuse_two_launchers(config: DictConfig, asked_by: str) -> None:
    """Raises `UsageError` if launcher= is given as well, or the command takes no launcher."""
    if "sweep" not in config:
        raise UsageError(
            f"{asked_by} is for trainings and evaluations: relloc.{config.hydra.job.name} runs here"
        )
    chosen = config.hydra.runtime.choices.get("launcher")
    if chosen not in (None, "here"):
        raise UsageError(f"launcher={chosen} and {asked_by} are two launchers: give one")


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings with nested configs as plain dicts and lists."""
    plain = {}
    for name, value in settings.items():
        is_config = OmegaConf.is_config(value)
        plain[name] = OmegaConf.to_container(value, resolve=True) if is_config else value
    return plain
