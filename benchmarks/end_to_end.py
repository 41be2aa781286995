"""Images/s of a whole training from JPEG shards, beside the optimizer step alone, in one run.

Trains ResNet-50 by `python -m relloc.train` on packed images until `--steps`, with logging,
checkpoints, monitors and MLflow at their defaults. The rate is read from the run's journal: images
of all steps after the first report, in which compiling happens, over the wall time of those steps,
monitors and reports included. The step alone is timed by pretext_step.py with the same settings.
With `--gpus 1,2` it trains on each number of GPUs, with as many images a GPU, and prints how much
faster more are; `--cores 16` gives each training so many processor cores a GPU. Each training has
a folder of its own below `--out`.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from report import REPOSITORY, arguments, tell

from relloc.data.shards import shards
from relloc.tracking import read_journal

EPOCHS_70 = 70 * 1_281_167


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shards", required=True, help="a folder that relloc.prepare packed")
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the runs")
    parser.add_argument(
        "--steps",
        type=int,
        default=2000,
        help="enough for monitors, 5 %% of the time at most, to come as they will",
    )
    parser.add_argument("--images", type=int, default=512, help="images a step and GPU")
    parser.add_argument("--gpus", default="1", help="numbers of GPUs, such as 1,2")
    parser.add_argument("--cores", type=int, help="processor cores a GPU (all there are)")
    parser.add_argument(
        "--step-rate", type=float, help="images/s of the step alone, if it was just measured here"
    )
    parser.add_argument("overrides", nargs="*", help="settings of relloc.train, such as color=drop")
    options = parser.parse_args()
    rows, ratios = [], {}
    counts = [int(gpus) for gpus in options.gpus.split(",")]
    if options.out.exists():
        parser.error(f"--out {options.out} is there already: runs in it would be gone on with")
    if options.step_rate is None and 1 in counts:
        rows.append(_step_alone(options))
    rows += [_training(gpus, options) for gpus in counts]
    of_training = [row for row in rows if row["side"] == "training"]
    if of_training[0]["GPUs"] == 1:
        alone = options.step_rate or rows[0]["images/s"]
        ratios["training over the step alone, one GPU"] = of_training[0]["images/s"] / alone
    for row in of_training[1:]:
        ratios[f"{row['GPUs']} GPUs over {of_training[0]['GPUs']}"] = (
            row["images/s"] / of_training[0]["images/s"]
        )
    for row in of_training:
        ratios[f"hours of 70 epochs of ImageNet, {row['GPUs']} GPU"] = EPOCHS_70 / (
            row["images/s"] * 3600
        )
    tell(
        "pretraining from JPEG shards, ResNet-50",
        rows,
        ratios,
        options.json,
        settings=vars(options),
    )


def _training(gpus: int, options: argparse.Namespace) -> dict[str, object]:
    run_dir = options.out / f"{gpus}_gpus"
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
        if gpus > 1
        else []
    )
    settings = [
        *(
            "model=resnet50",
            "data=folder",
            f"data.shards={options.shards}",
            "eval=[]",
            "schedule=constant",
        ),
        *(
            f"recipe.images_per_step={options.images * gpus}",
            f"hydra.run.dir={run_dir}",
            *options.overrides,
        ),
        f"schedule.epochs={_epochs(options, gpus)}",
    ]
    environment = {**os.environ, "RELLOC_RUNS": str(options.out), "OMP_NUM_THREADS": "1"}
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(
        0, sorted(own)[: options.cores and options.cores * gpus]
    )  # children inherit it
    try:
        subprocess.run(
            [sys.executable, *torchrun, "-m", "relloc.train", *settings],
            env=environment,
            check=True,
        )
    finally:
        os.sched_setaffinity(0, own)
    told = [entry for entry in read_journal(run_dir) if "train/loss" in entry.metrics]
    first, last = told[0], told[-1]
    images, seconds = options.images * gpus, (last.time_ms - first.time_ms) / 1000
    between = [
        1000 * (b.step - a.step) * images / (b.time_ms - a.time_ms)
        for a, b in itertools.pairwise(told)
    ]
    waiting = [entry.metrics["speed/waiting_percent"] for entry in told[1:]]
    return {
        "side": "training",
        "GPUs": gpus,
        "images/s": (last.step - first.step) * images / seconds,
        "between reports, median": statistics.median(between),
        "steps": last.step - first.step,
        "waiting for data %": sum(waiting) / len(waiting),
        "loss": last.metrics["train/loss"],
    }


def _epochs(options: argparse.Namespace, gpus: int) -> float:
    """Epochs that take `--steps` steps of these shards."""
    steps_per_epoch = len(shards(root=options.shards).train) // (options.images * gpus)
    return options.steps / max(1, steps_per_epoch)


def _step_alone(options: argparse.Namespace) -> dict[str, object]:
    out = options.out / "step_alone.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [
        *(
            sys.executable,
            str(REPOSITORY / "benchmarks" / "pretext_step.py"),
            "--patch-px",
            "64",
            "--ours-only",
        ),
        *("--images", str(options.images), "--json", str(out), *options.overrides),
    ]
    subprocess.run(command, check=True)
    (row,) = json.loads(out.read_text())["rows"]
    return {"side": "step alone", "GPUs": 1, "images/s": row["images/s"]}


if __name__ == "__main__":
    main()
