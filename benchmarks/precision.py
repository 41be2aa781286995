"""Does bfloat16 train as well as float32? Draws the loss curves of two trainings of one seed.

Everything but `precision` is the same, the order of images and all chance included. Prints the
loss over the last tenth of the steps and the held-out pretext accuracy of each.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a file, never a window

import matplotlib.pyplot as plt
from report import arguments, tell

from relloc.results import read_results
from relloc.tracking import read_journal

Curve = list[tuple[int, float]]  # step, mean loss since the last report


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="a new folder for the runs and the picture"
    )
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument(
        "overrides",
        nargs="*",
        help="settings of relloc.train, such as data=folder data.shards=SHARDS",
    )
    options = parser.parse_args()
    curves = {
        one: _train(options.out / one, one, options.overrides)
        for one in options.precisions.split(",")
    }
    rows = [_row(precision, curve, options.out / precision) for precision, curve in curves.items()]
    losses = [row["loss, last tenth"] for row in rows]
    _draw(curves, options.out / "loss_by_precision.png")
    ratios = {f"loss of {rows[1]['precision']} over {rows[0]['precision']}": losses[1] / losses[0]}
    tell("training by precision", rows, ratios, options.json, settings=vars(options))
    print(f"picture {options.out / 'loss_by_precision.png'}")


def _train(run_dir: Path, precision: str, overrides: list[str]) -> Curve:
    settings = [
        f"precision={precision}",
        f"hydra.run.dir={run_dir}",
        "eval=[]",
        "tracking=none",
        *overrides,
    ]
    environment = {**os.environ, "RELLOC_RUNS": str(run_dir.parent)}
    subprocess.run([sys.executable, "-m", "relloc.train", *settings], env=environment, check=True)
    told = [entry for entry in read_journal(run_dir) if "train/loss" in entry.metrics]
    return [(entry.step, entry.metrics["train/loss"]) for entry in told]


def _row(precision: str, curve: Curve, run_dir: Path) -> dict[str, Any]:
    last = [loss for step, loss in curve if step > 0.9 * curve[-1][0]]
    (asked,) = [row for row in read_results(run_dir) if row.eval == "pretext"]
    return {
        "precision": precision,
        "steps": curve[-1][0],
        "loss, last tenth": sum(last) / len(last),
        "held-out top-1 %": asked.value,
        "95 % interval": f"{asked.low:.1f} to {asked.high:.1f}",
    }


def _draw(curves: dict[str, Curve], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for precision, curve in curves.items():
        axis.plot(*zip(*curve, strict=True), label=precision, linewidth=1.2)
    axis.set_xlabel("step")
    axis.set_ylabel("pretext loss, training")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
