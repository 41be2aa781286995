"""What a job asks the cluster for: the launcher's settings, as submitit takes them."""

import difflib
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from relloc.checks import whole
from relloc.errors import UsageError

# Settings that say how relloc submits, not what a job asks for
_NOT_ASKED = (
    "dry_run",
    "tasks_per_node",
    "gpus_per_node",
    "setup",
    "srun_args",
    "additional_parameters",
    "submitit",
)
_NOT_ASKED += ("max_num_timeout", "timeout_min")
# submitit's own names for what all its clusters have; others are SLURM's
_COMMON = ("nodes", "cpus_per_task", "mem_gb")
# sbatch's names for settings that are called otherwise here
_CALLED = {"time": "timeout_min", "mem": "mem_gb", "ntasks_per_node": "tasks_per_node"}
# Options of sbatch on which submitting, or what is done at a signal, depends
_OURS = (
    "array",
    "output",
    "error",
    "open_mode",
    "signal",
    "wait",
    "wrap",
    "parsable",
    "test_only",
    "quiet",
)


def parameters_of(
    settings: Mapping[str, Any],
    *,
    prefix: str,
    name: str,
    token: str,
    code: Path,
    setup: Sequence[str],
) -> dict[str, Any]:
    """The parameters of submitit's AutoExecutor; settings that are null are left to the cluster.

    Args:
        settings: by the names of launchers/conf/slurm.yaml.
        prefix: how the user names a setting: "launcher." or "hydra.launcher.".
        name: of the job.
        token: marks the job, see `clients.new_token`.
        code: the folder that the job imports relloc from.
        setup: lines of the batch script before the user's.

    Raises:
        UsageError: a setting that means nothing, or that contradicts another.
    """
    settings, additional = _sorted_out(settings, prefix)
    gpus, gpus_per_node = _gpus(settings, additional, prefix)
    tasks = settings["tasks_per_node"]
    tasks = max(1, gpus) if tasks == "auto" else whole(f"{prefix}tasks_per_node", tasks)
    together = tasks * whole(f"{prefix}nodes", settings["nodes"]) > 1
    for key, at_least in (("array_parallelism", 1), ("max_num_timeout", 0), ("signal_delay_s", 1)):
        whole(f"{prefix}{key}", settings[key], at_least)
    for key in ("cpus_per_task", "mem_gb"):
        if isinstance(settings[key], int | float) and settings[key] <= 0:
            raise UsageError(
                f"{prefix}{key}={settings[key]} is not above 0: null leaves it to the cluster"
            )
    lines = [f'export PYTHONPATH={shlex.quote(str(code))}"${{PYTHONPATH:+:$PYTHONPATH}}"']
    if (
        additional.get("export") is not None
    ):  # that is for the batch script; srun would not give our path to the tasks
        lines.append("unset SLURM_EXPORT_ENV")
    slurm: dict[str, Any] = {
        **{
            key: value
            for key, value in settings.items()
            if key not in (*_NOT_ASKED, *_COMMON) and value is not None
        },
        "job_name": name,
        "setup": [*lines, *setup, *settings["setup"]],
        # A task that ends badly ends the others, which would wait for it.
        "srun_args": [*(["--kill-on-bad-exit=1"] if together else []), *settings["srun_args"]],
        "additional_parameters": {"requeue": True, **additional},
        **settings["submitit"],
    }
    # A comment may be what a site bills by: then the token goes into the name.
    if slurm.get("comment") or additional.get("comment"):
        slurm["job_name"] = f"{slurm['job_name']}_{token}"
    else:
        slurm["comment"] = token
    if gpus_per_node:
        slurm["gpus_per_node"] = gpus_per_node
    common = {key: settings[key] for key in _COMMON if settings[key] is not None} | {
        "tasks_per_node": tasks
    }
    if (limit := settings["timeout_min"]) is not None:
        if isinstance(limit, int | float) and limit < 1:
            raise UsageError(
                f"{prefix}timeout_min={limit} is less than a minute: null leaves it to the partition"
            )
        common["timeout_min"] = limit
    return common | {f"slurm_{key}": value for key, value in slurm.items()}


def gpus_asked(text: str | int | None) -> int:
    """How many GPUs `4`, `a100:4`, `a100` or `a100:2,v100:1` are. Raises `ValueError`."""
    parts = str(text or 0).split(",")
    return sum(_count(part.split(":")) for part in parts)


def gpus_of_gres(gres: str) -> int | None:
    """How many GPUs a node's gres such as gpu:a100:4,tmpdisk:100 has; None where it names none. Raises `ValueError`."""
    counts = []
    for part in gres.split(","):
        fields = (
            re.sub(r"\(.*", "", part.strip())
            .removeprefix("gres/")
            .removeprefix("gres:")
            .replace("=", ":")
        )
        kind, *rest = fields.split(":")
        if kind == "gpu":
            counts.append(_count(rest))
    return sum(counts) if counts else None


def _count(fields: Sequence[str]) -> int:
    """The number at the end of type and number, of which either may be missing."""
    last = fields[-1].strip() if fields else ""
    if last.isdigit():
        return int(last)
    if re.fullmatch(r"[\w.-]*", last) and not last.startswith("-"):
        return 1
    raise ValueError(f"{':'.join(fields)} is no number of GPUs")


def _sorted_out(settings: Mapping[str, Any], prefix: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings, and sbatch's other options, each once. Raises `UsageError`."""
    made = dict(settings)
    _check_types(made, prefix)
    for name in ("partition", "exclude"):
        if isinstance(made[name], list):
            made[name] = ",".join(map(str, made[name]))
    for key, value in made["additional_parameters"].items():
        if isinstance(value, dict | list):
            raise UsageError(
                f"{prefix}additional_parameters.{key}={value} is no value of an option of sbatch: quote it"
            )
    made["submitit"], given = (_named(made[name]) for name in ("submitit", "additional_parameters"))
    _check_submitit(made["submitit"], prefix)
    for where, found in (("additional_parameters", given), ("submitit", made["submitit"])):
        for key in list(found):
            called = _CALLED.get(key, key)
            if key in _OURS:
                raise UsageError(
                    f"{prefix}{where}.{key} can't be given: relloc sets it, or its jobs depend on it"
                )
            if called not in settings:
                continue
            if called != key or made[called] not in (None, [], "auto"):
                raise UsageError(f"{prefix}{where}.{key} is {prefix}{called}: give it there")
            made[called] = found.pop(key)
    return made, given


def _named(options: Mapping[str, Any]) -> dict[str, Any]:
    """By names as Python writes them: mail-user and --mail-user are mail_user. Those that are null are left out."""
    return {
        str(key).lstrip("-").replace("-", "_"): value
        for key, value in options.items()
        if value is not None
    }


def _check_types(settings: Mapping[str, Any], prefix: str) -> None:
    for name in ("setup", "srun_args"):
        if not isinstance(settings[name], list) or not all(
            isinstance(line, str) for line in settings[name]
        ):
            raise UsageError(
                f"{prefix}{name}={settings[name]} is not a list, such as [{settings[name]}]"
            )
    for name in ("additional_parameters", "submitit"):
        if not isinstance(settings[name], dict):
            raise UsageError(
                f"{prefix}{name}={settings[name]} is not a mapping: +{prefix}{name}.NAME=VALUE adds to it"
            )


def _check_submitit(given: Mapping[str, Any], prefix: str) -> None:
    from submitit import SlurmExecutor

    known = SlurmExecutor._valid_parameters() | {"name", "stderr_to_stdout"}
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UsageError(
                f"there is no setting {key} of submitit: {hint}{prefix}additional_parameters takes options of sbatch"
            )


def _gpus(
    settings: Mapping[str, Any], additional: Mapping[str, Any], prefix: str
) -> tuple[int, str | int | None]:
    """GPUs of a node, and what is asked as gpus_per_node; None where another setting asks for them.

    Raises `UsageError` where two settings ask, and not for the same.
    """
    asked, gres = settings["gpus_per_node"], settings["gres"]
    if gres is not None and not isinstance(gres, str):
        raise UsageError(f"{prefix}gres={gres} is not text, such as gpu:4: quote it")
    if isinstance(asked, bool) or not isinstance(asked, str | int | None):
        raise UsageError(f"{prefix}gpus_per_node={asked} is no number of GPUs, such as 4 or a100:4")
    try:
        of_gres = gpus_of_gres(gres) if gres else None
        number = None if asked in ("auto", None) else gpus_asked(asked)
        in_all = gpus_asked(additional["gpus"]) if "gpus" in additional else None
        of_task = settings["submitit"].get("gpus_per_task", additional.get("gpus_per_task"))
        a_task = None if of_task is None else gpus_asked(of_task)
    except ValueError as error:
        raise UsageError(
            f"{prefix}gpus_per_node={asked}, {prefix}gres={gres}: {error}, such as 4 or a100:4"
        ) from None
    if of_gres is not None:
        if number not in (None, of_gres):
            raise UsageError(
                f"{prefix}gres={gres} and {prefix}gpus_per_node={asked} ask for different numbers of GPUs: give one"
            )
        return of_gres, None
    if number is None and a_task is not None:
        tasks = settings["tasks_per_node"]
        return (a_task * tasks if isinstance(tasks, int) else 1), None
    if number is None and in_all is not None:
        return max(1, in_all // whole(f"{prefix}nodes", settings["nodes"])), None
    if number is None:
        number = 1 if asked == "auto" else 0
    return number, (None if not number else number if asked == "auto" else asked)
