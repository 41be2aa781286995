"""Images/s of the default run's training by an older commit and by this checkout, in turns.

Other work on the same cores can slow one run many times over: `load` at the start of each run, and
`busy`, the cores that it really had, tell whether the ratio may be believed.
"""

import argparse
import contextlib
import dataclasses
import itertools
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import report

from relloc.tracking.journal import read_journal

BEFORE_THE_ENGINE = "b7bcc65"
# One epoch of the default run, and nothing but its training: no evaluations, no tracking server.
OVERRIDES = ("eval=[]", "tracking=none", "schedule.epochs=1", "schedule.milestone_epochs=[]")
RATE = "speed/images_per_s"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """A training: its reported rates but for the first, its seconds, and the load before it."""

    rates: list[float]
    clock_s: float
    cpu_s: float
    load: float


def main() -> None:
    """Run both sides in turns and compare the medians of all their reports."""
    asked = _asked()
    with _checked_out(asked.before) as before:
        sides = {
            f"before ({asked.before})": before,
            f"after ({report.commit()})": report.REPOSITORY,
        }
        runs: dict[str, list[Trained]] = {side: [] for side in sides}
        for _, (side, checkout) in itertools.product(range(asked.rounds), sides.items()):
            runs[side].append(_train(checkout, asked.overrides))
    rows = [
        _row(side, number, run)
        for side, done in runs.items()
        for number, run in enumerate(done, start=1)
    ]
    before_rate, after_rate = (
        statistics.median(rate for run in done for rate in run.rates) for done in runs.values()
    )
    settings = vars(asked) | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")}
    report.tell(
        "default run",
        rows,
        {"after to before": after_rate / before_rate},
        asked.json,
        settings=settings,
    )


def _train(checkout: Path, overrides: list[str]) -> Trained:
    _require_own_package(checkout)
    load, cpu_s, clock_s = os.getloadavg()[0], _children_s(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="relloc_run_") as folder:
        _python(
            checkout, "-m", "relloc.train", *OVERRIDES, *overrides, f"hydra.run.dir={folder}/run"
        )
        clock_s, cpu_s = time.monotonic() - clock_s, _children_s() - cpu_s
        metrics = [entry.metrics for entry in read_journal(Path(folder) / "run")]
    rates = [metric[RATE] for metric in metrics if RATE in metric]
    if len(rates) < 2:
        raise SystemExit(
            f"{checkout}: only {len(rates)} reports of {RATE}; train longer: schedule.epochs=2"
        )
    return Trained(rates=rates[1:], clock_s=clock_s, cpu_s=cpu_s, load=load)


def _children_s() -> float:
    """Processor seconds of all processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _require_own_package(checkout: Path) -> None:
    found = _python(checkout, "-c", "import relloc; print(relloc.__file__)").strip()
    if Path(found).resolve() != (checkout / "relloc" / "__init__.py").resolve():
        raise SystemExit(f"python in {checkout} takes relloc from {found}, not from there")


def _python(checkout: Path, *arguments: str) -> str:
    """What a Python started in a checkout prints; its own package comes before an installed one."""
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    ended = subprocess.run(
        [sys.executable, *arguments],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        raise SystemExit(
            f"{checkout}: {' '.join(arguments)} failed:\n"
            f"{ended.stdout[-2000:]}{ended.stderr[-2000:]}"
        )
    return ended.stdout


@contextlib.contextmanager
def _checked_out(revision: str) -> Iterator[Path]:
    """A revision in a worktree of its own, removed at the end."""
    with tempfile.TemporaryDirectory(prefix="relloc_before_") as folder:
        tree = Path(folder).resolve() / "tree"
        _git("worktree", "add", "--quiet", "--detach", str(tree), revision)
        try:
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _git(*arguments: str) -> None:
    if subprocess.run(["git", "-C", str(report.REPOSITORY), *arguments], check=False).returncode:
        raise SystemExit(f"git {' '.join(arguments)} failed")


def _row(side: str, number: int, run: Trained) -> dict[str, Any]:
    return {
        "side": side,
        "run": number,
        "images/s": statistics.median(run.rates),
        "slowest": min(run.rates),
        "fastest": max(run.rates),
        "s in all": run.clock_s,
        "load": run.load,
        "busy": run.cpu_s / run.clock_s,
    }


def _asked() -> argparse.Namespace:
    parser = report.arguments(__doc__)
    parser.add_argument("--before", default=BEFORE_THE_ENGINE, help="the revision to compare with")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side")
    parser.add_argument(
        "overrides", nargs="*", help="more settings for both sides, such as color=drop"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
