"""What tracking costs: the share of training time, the time to send a run, and the time in which many runs appear.

The share: the default run's training with tracking=none and with MLflow in a SQLite file, in turns, by the rates that
the runs report but for the first. A run to be sent has 1,000 reports of six values in its journal and 200 final
results; it is sent by what `python -m relloc.sync` calls. The many runs are sent to one store, one after the other by
each of --processes processes, and are there when the store's own search gives all of them.
"""

import argparse
import concurrent.futures
import itertools
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from report import REPOSITORY, arguments, tell

from relloc.results import LAYERS, Result, append_results
from relloc.tracking import Journal, RunRecord, open_store, read_journal, search, sync, write_status

STEPS, RESULTS = 1000, 200
RATE = "speed/images_per_s"
TRAINING = ("eval=[]", "data.epochs=2", "data.warmup_epochs=0", "data.milestone_epochs=[]", "device=cpu")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="trainings of each side")
    parser.add_argument("--runs", type=int, default=256, help="runs that are sent to one store")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("overrides", nargs="*", help="settings of relloc.train for both sides")
    options = parser.parse_args()
    rates = _training_rates(options)
    none, followed = (statistics.median(rates[side]) for side in ("none", "sqlite"))
    one, many = _sending_s(options)
    rows = [
        {"what": "training, tracking=none", "images/s": none},
        {"what": "training, tracking=sqlite", "images/s": followed},
        {"what": f"one run of {STEPS} reports and {RESULTS} results, sent", "s": one},
        {"what": f"{options.runs} such runs until the store gives all, {options.processes} processes", "s": many},
    ]
    ratios = {"share of the time that tracking costs": 1 - followed / none, "runs a second": options.runs / many}
    tell("tracking", rows, ratios, options.json, settings=vars(options))


def _training_rates(options: argparse.Namespace) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {"none": [], "sqlite": []}
    for _, side in itertools.product(range(options.rounds), rates):
        with tempfile.TemporaryDirectory(prefix="relloc_tracking_") as folder:
            words = [*TRAINING, *options.overrides, f"tracking={side}", f"hydra.run.dir={folder}/run"]
            environment = os.environ | {"RELLOC_RUNS": folder}
            command = [sys.executable, "-m", "relloc.train", *words]
            subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, stdout=subprocess.DEVNULL)
            told = [entry.metrics[RATE] for entry in read_journal(Path(folder) / "run") if RATE in entry.metrics]
        rates[side] += told[1:]
    return rates


def _sending_s(options: argparse.Namespace) -> tuple[float, float]:
    """Seconds of the first run, which finds a store with its schema made; and of all, to where the store gives them."""
    with tempfile.TemporaryDirectory(prefix="relloc_tracking_") as folder:
        uri = f"sqlite:///{folder}/mlflow.db"
        runs = [_write_run(Path(folder) / f"run{number}", number) for number in range(options.runs + 1)]
        open_store(uri)
        one = _timed_sync(runs[0], uri)
        started = time.monotonic()
        parts = [runs[1 + first :: options.processes] for first in range(options.processes)]
        spawned = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(options.processes, mp_context=spawned) as pool:
            list(pool.map(_send, parts, [uri] * len(parts)))
        while len(search(uri, "relloc")) < len(runs):
            time.sleep(0.1)
        return one, time.monotonic() - started


def _timed_sync(run_dir: Path, uri: str) -> float:
    started = time.monotonic()
    sync(run_dir, uri)
    return time.monotonic() - started


def _send(run_dirs: Sequence[Path], uri: str) -> None:
    for run_dir in run_dirs:
        sync(run_dir, uri)


def _write_run(run_dir: Path, number: int) -> Path:
    run_dir.mkdir()
    params = {f"group{place // 10}.setting{place}": place for place in range(100)}
    RunRecord(name=f"gap{number} jit0", experiment="relloc", params=params | {"grid.gap_px": number}).write(run_dir)
    journal = Journal(run_dir)
    for step in range(10, 10 * STEPS + 1, 10):
        names = ("train/loss", "train/top1", "train/lr", "train/epoch", RATE, "speed/waiting_percent")
        journal.log(dict.fromkeys(names, 1 / step), step)
    common = {"dataset": "in1k", "split": "val", "n": 50_000, "seed": 0, "protocol": "3.3", "model": "resnet50"}
    places = itertools.product(range(RESULTS // len(LAYERS) + 1), LAYERS)
    rows = [
        Result(eval=f"eval{kind}", layer=layer, metric="top1", value=50.0, checkpoint="run", **common)
        for kind, layer in places
    ]
    append_results(run_dir, rows[:RESULTS])
    write_status(run_dir, "FINISHED")
    return run_dir


if __name__ == "__main__":
    main()
