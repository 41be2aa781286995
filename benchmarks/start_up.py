"""Seconds before the first training step: composing a run or a sweep, and the start of a job.

Commands that answer without torch are timed too. Each is a fresh process; the median of --rounds.
"s" is by the clock, "processor s" the time of its cores, which other jobs change less. A job of a
cluster begins with submitit's process, which starts the command; from the start of the command to
the end of its first step, of 64 photographs, is read from the journal. What importing takes is
Python's own account (-X importtime), which makes it slower.

`--compiled` times compiled starts alone, one after the other with one cache of compiled code: with
an empty cache; in another process; with another gap; and as torch caches by default, where networks
with ghost batch norm are traced and differentiated in each process.

`--evaluations` times starts of `relloc.evaluate` alone, from the command until the network has been
given the first batch of images, cold and warm, one after the other with one cache of compiled code.
Their processor seconds leave out the processes that read.
"""

import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from report import REPOSITORY, arguments, tell

from relloc.tracking import open_store, read_journal

LONGEST_S = 600
SWEEP = (
    "-m",
    "grid.gap_px=range(0,20)",
    "grid.jitter_px=range(0,20)",
    "launcher=slurm",
    "launcher.dry_run=true",
)
COMPOSE = """
import time, hydra
from relloc.runs.settings import conf_dir
started = time.perf_counter()
with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
    hydra.compose("train", ["grid.gap_px=16"])
print(time.perf_counter() - started)
"""
HEAVY = ("torch", "torchvision", "mlflow", "hydra", "scipy", "sklearn", "matplotlib", "pandas")
IMPORTED_FOR_TRAINING = (
    "import relloc.runs.pretraining; from relloc.tracking.store import load_mlflow; load_mlflow()"
)
TRAINING = (
    "eval=[]",
    "report_every_steps=1",
    "monitor.every_epochs=null",
    "workers=0",
)
EVALUATION = ("checkpoint=random", "tracking=none")
# A setting of torch, and the value with which it leaves out networks with functions of their own
DEFAULT_CACHE = {"TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD": "0"}
# torch checks in each process whether the vector instructions of a CPU work, for about 15 s
NO_CHECK = {"TORCHINDUCTOR_VEC_ISA_OK": "1"}
# Runs relloc.evaluate until it asks for a second batch, which it does once the first is encoded
FIRST_BATCH = """
import os, runpy, time
from relloc.features.source import EncodeConfig

read = EncodeConfig.read

def first(*arguments, **named):
    yield next(read(*arguments, **named))
    print("first batch at", time.time(), flush=True)
    os._exit(0)

EncodeConfig.read = first
runpy.run_module("relloc.evaluate", run_name="__main__")
"""
# In this order: the first fills the cache
COMPILED: dict[str, tuple[str, dict[str, str]]] = {
    "cold": ("grid.gap_px=5", {}),
    "warm": ("grid.gap_px=5", {}),
    "warm, another gap and seed": ("grid.gap_px=8", {}),
    "warm, as torch caches by default": ("grid.gap_px=5", DEFAULT_CACHE),
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--compiled", action="store_true", help="time compiled starts, cold and warm"
    )
    which.add_argument("--evaluations", action="store_true", help="time starts of relloc.evaluate")
    parser.add_argument("--device", default="cpu", help="where the first steps are taken")
    parser.add_argument(
        "--cache", type=Path, help="a new folder that compiled code of --compiled is left in"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        help="settings of the trainings or evaluations, such as model=resnet50",
    )
    options = parser.parse_args()
    words = [f"device={options.device}", *options.overrides]
    if options.cache and not options.compiled:
        parser.error("--cache is of --compiled alone")
    if options.compiled:
        if options.cache and options.cache.exists():
            parser.error(f"--cache {options.cache} is there already: the first start would be warm")
        rows = _compiled_rows(words, options.rounds, options.cache)
        tell("start-up, compiled", rows, {}, options.json, settings=vars(options))
        return

    if options.evaluations:
        rows = _evaluation_rows(words, options.rounds)
        tell("start-up of evaluations", rows, {}, options.json, settings=vars(options))
        return

    def median(what: str, *command: str) -> dict[str, Any]:
        taken = [_taken(command) for _ in range(options.rounds)]
        return {"what": what, "s": _median(taken, 0), "processor s": _median(taken, 1)}

    composing = [float(_output("-c", COMPOSE)) for _ in range(options.rounds)]
    first = [_first_step_s(*words) for _ in range(options.rounds)]
    rows = [
        {"what": "one run composed, Hydra imported before", "s": statistics.median(composing)},
        median("--cfg job, whole command", "-m", "relloc.train", "--cfg", "job"),
        median("--help, whole command", "-m", "relloc.train", "--help"),
        median("sweep of 400 points, whole command", "-m", "relloc.train", *SWEEP),
        median(
            "job: submitit and relloc's launcher imported",
            "-c",
            "import submitit.core.submission, hydra_plugins.relloc_launchers.job",
        ),
        {
            "what": "job: command to its first training step",
            "s": _median(first, 0),
            "processor s": _median(first, 1),
        },
        *({"what": f"of that, importing {name}", "s": taken} for name, taken in _importing_s()),
    ]
    loaded = sorted(
        {"torch", "mlflow"} & {name for words in ("--help", "--cfg") for name in _loaded_by(words)}
    )
    tell("start-up", rows, {}, options.json, settings=vars(options))
    print(f"loaded by --help and --cfg job: {', '.join(loaded) or 'neither torch nor mlflow'}")


def _median(taken: Sequence[tuple[float, ...]], place: int) -> float:
    return statistics.median(pair[place] for pair in taken)


def _run(
    *command: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory(prefix="relloc_start_") as folder:
        variables = os.environ | {"RELLOC_RUNS": folder} | (environment or {})
        line = [sys.executable, *command]
        done = subprocess.run(
            line, cwd=REPOSITORY, env=variables, capture_output=True, text=True, timeout=LONGEST_S
        )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    return done


def _output(*command: str) -> str:
    return _run(*command).stdout


def _taken(command: Sequence[str]) -> tuple[float, float]:
    clock, processor = time.monotonic(), _children_s()
    _run(*command)
    return time.monotonic() - clock, _children_s() - processor


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _compiled_rows(words: Sequence[str], rounds: int, kept: Path | None) -> list[dict[str, Any]]:
    """First and tenth steps of compiled trainings, each round with an empty cache at first.

    What the last round compiled is copied to the folder `kept`.
    """
    taken: dict[str, list[tuple[float, float, float]]] = {name: [] for name in COMPILED}
    for round_number in range(rounds):
        with tempfile.TemporaryDirectory(prefix="relloc_compiled_") as cache:
            for number, (name, (grid, variables)) in enumerate(COMPILED.items()):
                environment = {"TORCHINDUCTOR_CACHE_DIR": cache} | NO_CHECK | variables
                seed = f"seed={number}"
                taken[name].append(
                    _steps_s(10, "compile=true", grid, seed, *words, environment=environment)
                )
            if kept and round_number == rounds - 1:
                shutil.copytree(cache, kept)
    return [
        {
            "what": f"compiled, {name}",
            "first step s": _median(times, 0),
            "tenth step s": _median(times, 1),
            "processor s": _median(times, 2),
        }
        for name, times in taken.items()
    ]


def _evaluation_rows(words: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """First batches of evaluations, each round with an empty cache at first."""
    taken: dict[str, list[tuple[float, float]]] = {"cold": [], "warm": [], "warm again": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="relloc_compiled_") as cache:
            for times in taken.values():
                times.append(_first_batch_s(words, {"TORCHINDUCTOR_CACHE_DIR": cache} | NO_CHECK))
    return [
        {
            "what": f"relloc.evaluate, {name}",
            "first batch s": _median(times, 0),
            "processor s": _median(times, 1),
        }
        for name, times in taken.items()
    ]


def _first_batch_s(words: Sequence[str], environment: dict[str, str]) -> tuple[float, float]:
    """Seconds from the command's start until its first batch is encoded, and of the processor."""
    started, processor = time.time(), _children_s()
    said = _run("-c", FIRST_BATCH, *EVALUATION, *words, environment=environment).stdout
    _, found, told = said.partition("first batch at ")
    if not found:
        raise SystemExit(f"relloc.evaluate {' '.join(words)} encoded nothing:\n{said[-2000:]}")
    return float(told.split()[0]) - started, _children_s() - processor


def _first_step_s(*words: str) -> tuple[float, float]:
    """Seconds from the command's start to step 1 in its journal, and its processor seconds."""
    first, _, processor = _steps_s(1, *words)
    return first, processor


def _steps_s(
    steps: int, *words: str, environment: dict[str, str] | None = None
) -> tuple[float, float, float]:
    """Seconds from the command's start to its first step and to step `steps`, and of the processor.

    The command is killed after these steps.
    """
    with tempfile.TemporaryDirectory(prefix="relloc_start_") as folder:
        run_dir = Path(folder) / "run"
        open_store(f"sqlite:///{folder}/mlflow.db")  # made once, not in every job
        line = [sys.executable, "-m", "relloc.train", *TRAINING, *words, f"hydra.run.dir={run_dir}"]
        environment = os.environ | {"RELLOC_RUNS": folder} | (environment or {})
        started, processor = time.time(), _children_s()
        command = subprocess.Popen(line, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL)
        while (
            len(told := read_journal(run_dir)) < steps
            and command.poll() is None
            and time.time() - started < LONGEST_S
        ):
            time.sleep(0.05)
        command.send_signal(signal.SIGKILL)
        command.wait()
        if len(told) < steps:
            raise SystemExit(f"{' '.join(line)}: {len(told)} of {steps} steps were told")
        first, last = (told[index].time_ms / 1000 - started for index in (0, steps - 1))
        return first, last, _children_s() - processor


def _imports(*command: str) -> dict[str, tuple[float, float]]:
    """Seconds that each imported module took alone, and with all that it was first to import."""
    lines = [
        line.removeprefix("import time:").split("|")
        for line in _run("-X", "importtime", *command).stderr.splitlines()
    ]
    told = [line for line in lines if len(line) == 3 and line[0].strip().isdigit()]
    return {name.strip(): (float(alone) / 1e6, float(whole) / 1e6) for alone, whole, name in told}


def _importing_s() -> list[tuple[str, float]]:
    found = _imports("-c", IMPORTED_FOR_TRAINING)
    large = [(name, found[name][1]) for name in HEAVY if name in found]
    return [("everything", sum(alone for alone, _ in found.values())), *large]


def _loaded_by(words: str) -> set[str]:
    more = ("job",) if words == "--cfg" else ()
    return set(_imports("-m", "relloc.train", words, *more))


if __name__ == "__main__":
    main()
