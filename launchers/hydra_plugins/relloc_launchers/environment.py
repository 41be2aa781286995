"""The environment that sbatch is called with: the user's defaults for it, as far as the batch script leaves them."""

import re
from collections.abc import Mapping

# Variables of SLURM that a job has of its own, and that name no job: where the cluster is, and who asks
_NOT_OF_A_JOB = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
_OF_TRAINING = (
    "MASTER_ADDR",
    "MASTER_PORT",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
)
# Options of sbatch that its variables call otherwise
_VARIABLES = {
    "TIMELIMIT": "time",
    "ARRAY_INX": "array",
    "NO_REQUEUE": "requeue",
    "MEM_PER_NODE": "mem",
}
_MEMORY = {"mem", "mem-per-cpu", "mem-per-gpu"}
_GPUS = {"gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket"}
_NEVER = {"array", "wait"}  # the sweep decides what the array is, and who waits


def environment_for(script: str, given: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """The environment for sbatch, and the user's variables that give way to what the script says.

    SBATCH_* variables are defaults of the user's, but SLURM lets them win over lines of the script: those that the
    script decides are left out. Inside of a job, what SLURM told that job is not for the next one.
    """
    inside = "SLURM_JOB_ID" in given or "SLURM_JOBID" in given
    kept, gave_way = {}, []
    said = set(re.findall(r"^#SBATCH --([\w-]+)", script, re.MULTILINE)) | _NEVER
    said |= _MEMORY if said & _MEMORY else set()
    has_gpus = (
        bool(said & _GPUS)
        or re.search(r"^#SBATCH --gres=.*\bgpu\b", script, re.MULTILINE) is not None
    )
    for name, value in given.items():
        if name in _OF_TRAINING or name.startswith("SUBMITIT_"):
            continue
        if inside and _is_of_a_job(name):
            continue
        if name.startswith("SBATCH_"):
            option = _option(name)
            asks_for_gpus = option in _GPUS or (option == "gres" and "gpu" in value)
            if option in said or (has_gpus and asks_for_gpus):
                gave_way.append(f"{name}={value}")
                continue
        kept[name] = value
    return kept, sorted(gave_way)


def cluster_of(parameters: Mapping[str, object], environment: Mapping[str, str]) -> str | None:
    """The cluster, or several with commas, that sbatch is asked for; None is the one of this machine."""
    for name in ("clusters", "cluster", "M"):
        if parameters.get(name):
            return str(parameters[name])
    return environment.get("SBATCH_CLUSTERS") or None


def _is_of_a_job(name: str) -> bool:
    prefixes = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_CPU_BIND", "SBATCH_MEM_BIND")
    return name.startswith(prefixes) and name not in _NOT_OF_A_JOB


def _option(variable: str) -> str:
    name = variable.removeprefix("SBATCH_")
    return _VARIABLES.get(name, name.lower().replace("_", "-"))
