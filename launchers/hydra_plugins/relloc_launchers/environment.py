"""The environment that sbatch is called with: the user's, without what the batch script sets."""

import re
from collections.abc import Mapping

# Variables of SLURM that don't describe a job: where the cluster is, and who asks
_NOT_OF_A_JOB = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
_COMPILED_CODE = "TORCHINDUCTOR_CACHE_DIR"
_OF_TRAINING = (
    "MASTER_ADDR",
    "MASTER_PORT",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
)
# Options of sbatch, by the names that its variables have for them where these differ
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
    """Returns the environment for sbatch, and the variables `NAME=VALUE` that were left out.

    SBATCH_* variables are the user's defaults, but SLURM lets them override lines of the script.
    Hence those for options that the script sets are left out. Within a job, the variables that
    describe it are left out too, since they are wrong for the next job. So is the folder of
    compiled code that torch has set itself, in the temporary directory of this process.
    """
    inside = "SLURM_JOB_ID" in given or "SLURM_JOBID" in given
    kept = {}
    left_out = []
    # The options that the script sets. One for memory, or for GPUs, excludes all others for it.
    script_options = set(re.findall(r"^#SBATCH --([\w-]+)", script, re.MULTILINE)) | _NEVER
    if script_options & _MEMORY:
        script_options |= _MEMORY
    gres_with_gpus = re.search(r"^#SBATCH --gres=.*\bgpu\b", script, re.MULTILINE)
    has_gpus = bool(script_options & _GPUS) or gres_with_gpus is not None
    for name, value in given.items():
        if name in _OF_TRAINING or name.startswith("SUBMITIT_"):
            continue
        if inside and _is_of_a_job(name):
            continue
        if name == _COMPILED_CODE and _is_torchs_default(value):
            continue
        if name.startswith("SBATCH_"):
            option = _option(name)
            asks_for_gpus = option in _GPUS or (option == "gres" and "gpu" in value)
            if option in script_options or (has_gpus and asks_for_gpus):
                left_out.append(f"{name}={value}")
                continue
        kept[name] = value
    return kept, sorted(left_out)


def cluster_of(parameters: Mapping[str, object], environment: Mapping[str, str]) -> str | None:
    """Returns the cluster for sbatch, or several with commas; None for that of this machine."""
    for name in ("clusters", "cluster", "M"):
        if parameters.get(name):
            return str(parameters[name])
    return environment.get("SBATCH_CLUSTERS") or None


def _is_of_a_job(name: str) -> bool:
    """Whether a variable describes the job in which this process runs."""
    prefixes = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_CPU_BIND", "SBATCH_MEM_BIND")
    return name.startswith(prefixes) and name not in _NOT_OF_A_JOB


def _is_torchs_default(folder: str) -> bool:
    """Whether torch sets its folder of compiled code to this one itself."""
    # This import takes seconds, and is needed only where the variable is set.
    from relloc.runs.compiled_code import is_torchs_default

    return is_torchs_default(folder)


def _option(variable: str) -> str:
    """Returns the option of sbatch for which a variable SBATCH_... is the default."""
    name = variable.removeprefix("SBATCH_")
    return _VARIABLES.get(name, name.lower().replace("_", "-"))
