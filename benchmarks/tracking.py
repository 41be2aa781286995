"""What tracking costs: a share of training time, and the time to send one run and many runs.

The share, by the clock: the default run's training with tracking=none and with MLflow in a SQLite
file, in turns, by steps over seconds from first to last report. The share, by the processor, which
other jobs change little: what a process uses of one core that does nothing but journal a report of
six values each 0.3 s, for --follow-s seconds, while MLflow, imported before, follows. A run to be
sent has --reports reports of six values in its journal and 200 final results; it is sent by what
`python -m relloc.sync` calls. The many runs are sent to one store, one after the other by each of
--processes processes, and are there when the store's own search gives all of them.
"""

import argparse
import concurrent.futures
import itertools
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from report import REPOSITORY, arguments, tell

from relloc.results import LAYERS, Result, append_results
from relloc.tracking import (
    Journal,
    Mirror,
    RunRecord,
    open_store,
    read_journal,
    search,
    sync,
    write_status,
)
from relloc.tracking.record import Scalar

RESULTS = 200
REPORT_S = 0.3
SEEN_S = 300
RATE = "speed/images_per_s"
REPORTED = ("train/loss", "train/top1", "train/lr", "train/epoch", RATE, "speed/waiting_percent")
TRAINING = (
    "eval=[]",
    "schedule.epochs=2",
    "schedule.warmup_epochs=0",
    "schedule.milestone_epochs=[]",
    "device=cpu",
)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="trainings of each side; 0 for none")
    parser.add_argument("--runs", type=int, default=256, help="runs that are sent to one store")
    parser.add_argument(
        "--reports", type=int, default=1000, help="of six values, in the journal of each run"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--follow-s", type=float, default=120, help="seconds of journaling that MLflow follows"
    )
    parser.add_argument("--server", help="the address of an MLflow server to send to as well")
    parser.add_argument("overrides", nargs="*", help="settings of relloc.train for both sides")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    if options.rounds:
        none, followed = (statistics.median(rates) for rates in _training_rates(options).values())
        rows.append({"what": "training, tracking=none", "steps/s": none})
        rows.append({"what": "training, tracking=sqlite", "steps/s": followed})
        ratios["percent of the time that tracking costs, by the clock"] = 100 * (
            1 - followed / none
        )
    with tempfile.TemporaryDirectory(prefix="relloc_tracking_") as folder:
        stores = {"SQLite": f"sqlite:///{folder}/mlflow.db"} | (
            {"server": options.server} if options.server else {}
        )
        for store, uri in stores.items():
            rows += _sending(options, store, uri)
            percent = 100 * _following_s(options.follow_s, uri) / options.follow_s
            ratios[f"percent of a core that following takes, {store}"] = percent
    tell("tracking", rows, ratios, options.json, settings=vars(options))


def _training_rates(options: argparse.Namespace) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {"none": [], "sqlite": []}
    for _, side in itertools.product(range(options.rounds), rates):
        with tempfile.TemporaryDirectory(prefix="relloc_tracking_") as folder:
            words = [
                *TRAINING,
                *options.overrides,
                f"tracking={side}",
                f"hydra.run.dir={folder}/run",
            ]
            environment = os.environ | {"RELLOC_RUNS": folder}
            command = [sys.executable, "-m", "relloc.train", *words]
            subprocess.run(
                command, cwd=REPOSITORY, env=environment, check=True, stdout=subprocess.DEVNULL
            )
            told = [entry for entry in read_journal(Path(folder) / "run") if RATE in entry.metrics]
        # Over all of the time: a median of reports would never see what is sent every 15 s.
        passed_s = (told[-1].time_ms - told[0].time_ms) / 1000
        rates[side].append((told[-1].step - told[0].step) / passed_s)
    return rates


def _sending(options: argparse.Namespace, store: str, uri: str) -> list[dict[str, Any]]:
    """Seconds to send one run to a prepared store, and all runs until the store lists them."""
    experiment = f"benchmark {uuid.uuid4().hex}"
    with tempfile.TemporaryDirectory(prefix="relloc_tracking_") as folder:
        runs = [
            _write_run(Path(folder) / f"run{n}", n, experiment, options.reports)
            for n in range(options.runs + 1)
        ]
        open_store(uri)
        sync(_write_run(Path(folder) / "warm", 0, "warm up", 1), uri)
        used, started = time.process_time(), time.monotonic()
        sync(runs[0], uri)
        one = {"s": time.monotonic() - started, "processor s of relloc": time.process_time() - used}
        used, started = _children_s(), time.monotonic()
        parts = [runs[1 + first :: options.processes] for first in range(options.processes)]
        spawned = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(options.processes, mp_context=spawned) as pool:
            list(pool.map(_send, parts, [uri] * len(parts)))
        end = time.monotonic() + SEEN_S
        while (seen := len(search(uri, experiment))) < len(runs):
            if time.monotonic() > end:
                raise SystemExit(
                    f"{store} gives {seen} of {len(runs)} runs, {SEEN_S} s after the last was sent"
                )
            time.sleep(0.1)
        many = {"s": time.monotonic() - started, "processor s of relloc": _children_s() - used}
    return [
        {
            "what": f"one run of {options.reports} reports and {RESULTS} results, sent to {store}",
            **one,
        },
        {
            "what": f"{options.runs} such runs until {store} gives all, "
            f"{options.processes} processes",
            **many,
        },
    ]


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _following_s(seconds: float, uri: str) -> float:
    """Processor seconds of a process that only journals, and of the threads that follow it."""
    with tempfile.TemporaryDirectory(prefix="relloc_tracking_") as folder:
        RunRecord(name="followed", experiment="followed", params={"seed": 0}).write(
            run_dir := Path(folder)
        )
        sync(run_dir, uri)  # what MLflow imports with its first use belongs to no second
        follower, journal = Mirror(run_dir, uri, warn=print), Journal(run_dir)
        used, end = time.process_time(), time.monotonic() + seconds
        follower.start()
        for step in itertools.count(10, 10):
            journal.log(dict.fromkeys(REPORTED, 1 / step), step)
            time.sleep(REPORT_S)
            if time.monotonic() > end:
                break
        if trouble := follower.close("FINISHED"):
            raise SystemExit(trouble)
        return time.process_time() - used


def _send(run_dirs: Sequence[Path], uri: str) -> None:
    for run_dir in run_dirs:
        sync(run_dir, uri)


def _write_run(run_dir: Path, number: int, experiment: str, reports: int) -> Path:
    run_dir.mkdir()
    params: dict[str, Scalar] = {"grid.gap_px": number}
    for place in range(100):
        params[f"group{place // 10}.setting{place}"] = place
    record = RunRecord(name=f"gap{number} jit0", experiment=experiment, params=params)
    record.write(run_dir)
    journal = Journal(run_dir)
    for step in range(10, 10 * reports + 1, 10):
        journal.log(dict.fromkeys(REPORTED, 1 / step), step)
    common = {
        "dataset": "in1k",
        "split": "val",
        "n": 50_000,
        "seed": 0,
        "protocol": "3.3",
        "model": "resnet50",
    }
    places = itertools.product(range(RESULTS // len(LAYERS) + 1), LAYERS)
    rows = [
        Result(
            eval=f"eval{kind}", layer=layer, metric="top1", value=50.0, checkpoint="run", **common
        )
        for kind, layer in places
    ]
    append_results(run_dir, rows[:RESULTS])
    write_status(run_dir, "FINISHED")
    return run_dir


if __name__ == "__main__":
    main()
