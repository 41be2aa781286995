"""Turns the launcher's settings into the resources of a job, as submitit takes them."""

import difflib
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from relloc.checks import whole
from relloc.errors import UsageError

# Settings that are not passed to submitit under their own names
_NOT_PASSED = (
    "dry_run",
    "tasks_per_node",
    "gpus_per_node",
    "setup",
    "srun_args",
    "additional_parameters",
    "submitit",
)
_NOT_PASSED += ("max_num_timeout", "timeout_min")
# Parameters that submitit has for all clusters; those of SLURM get the prefix slurm_.
_COMMON = ("nodes", "cpus_per_task", "mem_gb")
# Options of sbatch that are settings of another name here
_SETTING_OF_OPTION = {"time": "timeout_min", "mem": "mem_gb", "ntasks_per_node": "tasks_per_node"}
# Options of sbatch that submitting, or the handling of signals, depends on
_RESERVED = (
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
    """Returns the parameters of submitit's AutoExecutor.

    Settings that are null are left to the cluster.

    Args:
        settings: by the names of launchers/conf/slurm.yaml.
        prefix: how the user names a setting: "launcher." or "hydra.launcher.".
        name: of the job.
        token: marks the job, see `clients.new_token`.
        code: the folder that the job imports relloc from.
        setup: lines of the batch script before the user's.

    Raises:
        UsageError: a setting is invalid, or contradicts another.
    """
    settings, additional = _merged(settings, prefix)
    gpus, gpus_per_node = _gpus(settings, additional, prefix)
    # One task per GPU, unless the user says otherwise
    tasks = settings["tasks_per_node"]
    tasks = max(1, gpus) if tasks == "auto" else whole(f"{prefix}tasks_per_node", tasks)
    has_several_tasks = tasks * whole(f"{prefix}nodes", settings["nodes"]) > 1
    for key, at_least in (("array_parallelism", 1), ("max_num_timeout", 0), ("signal_delay_s", 1)):
        whole(f"{prefix}{key}", settings[key], at_least)
    for key in ("cpus_per_task", "mem_gb"):
        if isinstance(settings[key], int | float) and settings[key] <= 0:
            raise UsageError(
                f"{prefix}{key}={settings[key]} is not above 0: null leaves it to the cluster"
            )
    # The job imports the sweep's copy of the code. With --export, which is meant for the batch
    # script, srun would not pass that path on to the tasks.
    lines = [f'export PYTHONPATH={shlex.quote(str(code))}"${{PYTHONPATH:+:$PYTHONPATH}}"']
    if additional.get("export") is not None:
        lines.append("unset SLURM_EXPORT_ENV")
    handled = (*_NOT_PASSED, *_COMMON)
    passed = {key: value for key, value in settings.items() if key not in handled}
    passed = {key: value for key, value in passed.items() if value is not None}
    # A task that fails ends the others, which would wait for it.
    srun_args = ["--kill-on-bad-exit=1"] if has_several_tasks else []
    slurm: dict[str, Any] = {
        **passed,
        "job_name": name,
        "setup": [*lines, *setup, *settings["setup"]],
        "srun_args": [*srun_args, *settings["srun_args"]],
        "additional_parameters": {"requeue": True, **additional},
        **settings["submitit"],
    }
    # The token marks the job in its comment. A user's own comment, by which a site may bill, is
    # left alone: then the token is part of the name.
    if slurm.get("comment") or additional.get("comment"):
        slurm["job_name"] = f"{slurm['job_name']}_{token}"
    else:
        slurm["comment"] = token
    if gpus_per_node:
        slurm["gpus_per_node"] = gpus_per_node
    common = {key: settings[key] for key in _COMMON if settings[key] is not None}
    common["tasks_per_node"] = tasks
    limit = settings["timeout_min"]
    if limit is not None:
        if isinstance(limit, int | float) and limit < 1:
            raise UsageError(
                f"{prefix}timeout_min={limit} is less than a minute: "
                "null leaves it to the partition"
            )
        common["timeout_min"] = limit
    return common | {f"slurm_{key}": value for key, value in slurm.items()}


def gpus_asked(text: str | int | None) -> int:
    """Returns how many GPUs `4`, `a100:4`, `a100` or `a100:2,v100:1` are. Raises `ValueError`."""
    parts = str(text or 0).split(",")
    return sum(_count(part.split(":")) for part in parts)


def gpus_of_gres(gres: str) -> int | None:
    """Returns the number of GPUs in a node's gres, such as gpu:a100:4,tmpdisk:100.

    None if it names no GPUs. Raises `ValueError` for a number of GPUs that is none.
    """
    counts = []
    for part in gres.split(","):
        # Without the sockets in parentheses, gpu:4(S:0-1), and the prefix of some versions
        text = re.sub(r"\(.*", "", part.strip())
        text = text.removeprefix("gres/").removeprefix("gres:")
        kind, *rest = text.replace("=", ":").split(":")
        if kind == "gpu":
            counts.append(_count(rest))
    return sum(counts) if counts else None


def _count(fields: Sequence[str]) -> int:
    """Returns the number in `TYPE:NUMBER`, of which either may be missing: then it is 1."""
    last = fields[-1].strip() if fields else ""
    if last.isdigit():
        return int(last)
    if re.fullmatch(r"[\w.-]*", last) and not last.startswith("-"):
        return 1
    raise ValueError(f"{':'.join(fields)} is no number of GPUs")


def _merged(settings: Mapping[str, Any], prefix: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the settings, and the additional options of sbatch, with nothing given twice.

    Options of sbatch that relloc has a setting for become that setting.

    Raises:
        UsageError: an option is given twice, or is one that relloc itself sets.
    """
    made = dict(settings)
    _check_types(made, prefix)
    for name in ("partition", "exclude"):
        if isinstance(made[name], list):
            made[name] = ",".join(map(str, made[name]))
    for key, value in made["additional_parameters"].items():
        if isinstance(value, dict | list):
            raise UsageError(
                f"{prefix}additional_parameters.{key}={value} is no value of an option of sbatch: "
                "quote it"
            )
    made["submitit"] = _named(made["submitit"])
    given = _named(made["additional_parameters"])
    _check_submitit(made["submitit"], prefix)
    for where, options in (("additional_parameters", given), ("submitit", made["submitit"])):
        for key in list(options):
            setting = _SETTING_OF_OPTION.get(key, key)
            if key in _RESERVED:
                raise UsageError(
                    f"{prefix}{where}.{key} can't be given: "
                    "relloc sets it, or its jobs depend on it"
                )
            if setting not in settings:
                continue
            # Only an option that means the same, and whose setting has no value, is taken over.
            if setting != key or made[setting] not in (None, [], "auto"):
                raise UsageError(f"{prefix}{where}.{key} is {prefix}{setting}: give it there")
            made[setting] = options.pop(key)
    return made, given


def _named(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns options by names as Python writes them: mail_user for mail-user and --mail-user.

    Options that are null are left out.
    """
    return {
        str(key).lstrip("-").replace("-", "_"): value
        for key, value in options.items()
        if value is not None
    }


def _check_types(settings: Mapping[str, Any], prefix: str) -> None:
    """Raises `UsageError` for a list or mapping that is none."""
    for name in ("setup", "srun_args"):
        lines = settings[name]
        is_list = isinstance(lines, list) and all(isinstance(line, str) for line in lines)
        if not is_list:
            raise UsageError(
                f"{prefix}{name}={settings[name]} is not a list, such as [{settings[name]}]"
            )
    for name in ("additional_parameters", "submitit"):
        if not isinstance(settings[name], dict):
            raise UsageError(
                f"{prefix}{name}={settings[name]} is not a mapping: "
                f"+{prefix}{name}.NAME=VALUE adds to it"
            )


def _check_submitit(given: Mapping[str, Any], prefix: str) -> None:
    """Raises `UsageError` for a parameter that submitit doesn't have."""
    from submitit import SlurmExecutor

    known = SlurmExecutor._valid_parameters() | {"name", "stderr_to_stdout"}
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UsageError(
                f"there is no setting {key} of submitit: "
                f"{hint}{prefix}additional_parameters takes options of sbatch"
            )


def _gpus(
    settings: Mapping[str, Any], additional: Mapping[str, Any], prefix: str
) -> tuple[int, str | int | None]:
    """Returns the number of GPUs per node, and the value of the option gpus_per_node.

    The value is None if another option asks for the GPUs.

    Raises:
        UsageError: two settings ask for different numbers.
    """
    asked = settings["gpus_per_node"]
    gres = settings["gres"]
    if gres is not None and not isinstance(gres, str):
        raise UsageError(f"{prefix}gres={gres} is not text, such as gpu:4: quote it")
    if isinstance(asked, bool) or not isinstance(asked, str | int | None):
        raise UsageError(f"{prefix}gpus_per_node={asked} is no number of GPUs, such as 4 or a100:4")
    # GPUs can be asked for per node, as gres, in all, or per task.
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
                f"{prefix}gres={gres} and {prefix}gpus_per_node={asked} ask for different numbers "
                "of GPUs: give one"
            )
        return of_gres, None
    if number is None and a_task is not None:
        tasks = settings["tasks_per_node"]
        return (a_task * tasks if isinstance(tasks, int) else 1), None
    if number is None and in_all is not None:
        return max(1, in_all // whole(f"{prefix}nodes", settings["nodes"])), None
    # Nothing else asks for GPUs: `auto` is one per node.
    if number is None:
        number = 1 if asked == "auto" else 0
    if number == 0:
        return 0, None
    return number, number if asked == "auto" else asked
