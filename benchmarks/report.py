"""What every benchmark shares: the machine in words, timing in turns, a table, a JSON file."""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parent.parent
_LOAD_BEFORE = os.getloadavg()[0]


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write settings, machine, rows and ratios there"
    )
    return parser


def environment() -> dict[str, Any]:
    """Hardware, versions, date, commit, and the 1-minute load when the benchmark began."""
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    versions = {
        name: importlib.metadata.version(name) for name in ("torch", "torchvision", "pillow")
    }
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "python": platform.python_version(),
        **versions,
        "cuda": torch.version.cuda if gpus else None,
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "load_before": round(_LOAD_BEFORE, 2),
    }


def commit() -> str:
    """The commit of this checkout; "-dirty" says that files have been changed since."""
    asked = [
        "git",
        "-C",
        str(REPOSITORY),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=7",
        "--exclude=*",
    ]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def median_s(
    sides: Mapping[str, Callable[[], object]],
    *,
    device: torch.device,
    rounds: int,
    warm_up: int = 2,
) -> dict[str, float]:
    """Median seconds of one call of each side.

    Sides are called in turns, so that other work on the machine slows all alike. The first
    `warm_up` rounds are not counted. On a GPU a call lasts until its kernels are done.
    """
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warm_up + rounds):
        for name, work in sides.items():
            seconds = once_s(work, device)
            if number >= warm_up:
                taken[name].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def once_s(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, all of it: nothing is queued on the GPU before or after."""
    _finish(device)
    started = time.perf_counter()
    work()
    _finish(device)
    return time.perf_counter() - started


def tell(
    title: str,
    rows: Sequence[Mapping[str, Any]],
    ratios: Mapping[str, float],
    json_path: Path | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Print the rows as a table with the ratios below it.

    Both and the environment are written to `json_path`. Columns are the keys of the rows in order
    of appearance; a row without one leaves it empty.
    """
    about = environment()
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(_table(title, rows))
    for name, ratio in ratios.items():
        console.print(f"{name}: [bold]{ratio:.2f}[/bold]")
    machine = ", ".join([*about["gpus"], f"{about['cores']} cores of {about['cpu']}"])
    console.print(
        f"{machine}; {about['date'][:10]}, torch {about['torch']}, commit {about['commit']}, "
        f"load before {about['load_before']}"
    )
    if json_path:
        content = {
            "benchmark": title,
            "settings": settings or {},
            "environment": about,
            "rows": rows,
            "ratios": ratios,
        }
        json_path.write_text(json.dumps(content, indent=1, default=str) + "\n")
        console.print(f"written {json_path}")


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cpu() -> str:
    lines = (
        Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    )
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title=title)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for name in columns:
        numeric = _is_numeric(row.get(name) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(_shown(row.get(name)) for name in columns))
    return table


def _is_numeric(values: Iterable[Any]) -> bool:
    return all(value is None or isinstance(value, int | float) for value in values)


def _shown(value: Any) -> str:
    """A cell: nothing for None, and numbers with three digits or more that count."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
