"""Lines of results.jsonl as they were before they said their format: flat rows with a sentence as protocol.

Before 2026-11-29 it was the name of a metric only that told its k, and whether it is a spread over draws.

The sentence ended in "; VIEW, PRECISION; batch norm: …". This module is the only one that takes such text apart.
"""

import csv
import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_CHOICES = ("chosen", "rate chosen", "best epoch on val", "best of")
_SPREADS = ("std", "min", "max")
_SERIES = re.compile(r"(?P<name>\w+?)_k(?P<k>\d+)(?P<how>(_\w+)?)")
_COUNT = re.compile(r"[a-z0-9]+_k(\d+)")  # of neighbors, or of images a class: metrics such as `top1_k20` or `map_k16`


def convert(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `Result` from those of a line without a format.

    Raises:
        KeyError, TypeError: a field is missing, or not text where text is needed.
    """
    evaluation, metric, layer = fields["eval"], fields["metric"], fields["layer"]
    placed = _placed(f"{evaluation}/{metric}", layer) or {"table": evaluation, "column": layer, "variant": metric}
    # These had one name on the run's own images and on ImageNet
    if evaluation in ("knn", "label_free") and fields["dataset"] == "in1k":
        evaluation += "_in1k"
    facts = _facts(fields["protocol"])
    return {**with_series(fields), **facts, "eval": evaluation, "kind": _kind(evaluation), **placed}


def with_series(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a line, with `series`, `k` and `spread` as its metric's name tells them where it has none."""
    name, _, last = str(fields.get("metric")).rpartition("_")
    told: dict[str, Any] = {"spread": last} if last in _SPREADS else {}
    if found := _SERIES.fullmatch(name if told else str(fields.get("metric"))):
        told |= {"series": found["name"] + found["how"], "k": int(found["k"])}
    return {**told, **fields}


@functools.cache
def _rules() -> list[dict[str, str]]:
    """Which fields an evaluation's metric gets, the first that fits `measured`.

    In curly brackets: the layer, and the groups of the pattern.
    """
    text = Path(__file__).with_suffix(".csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def _placed(measured: str, layer: str) -> dict[str, Any]:
    """Where a number stands in reports; empty where no rule says so."""
    for rule in _rules():
        if found := re.fullmatch(rule["measured"], measured):
            words = {"layer": layer, **found.groupdict()}
            names = ("table", "column", "layer", "variant", "unit")
            placed = {name: rule[name].format_map(words) for name in names}
            is_percent = rule["unit"] == "%"
            return {**placed, "headline": rule["headline"] == "yes", "higher_is_better": True if is_percent else None}
    return {}


def _kind(evaluation: str) -> str:
    if evaluation == "pretext":
        return "pretext"
    return "fine-tuned" if evaluation.startswith("semisup") else "frozen"


def _facts(sentence: str) -> dict[str, Any]:
    """Protocol, deviations, choice, details, view and precision of a sentence."""
    before, found, after = sentence.rpartition("; batch norm: ")
    said, view, precision = sentence.split("; "), "", ""
    if found:
        *said, seen = before.split("; ")
        view, _, precision = seen.rpartition(", ")
        how, *more = after.split("; ")
        said += more if how == "statistics as trained" else [*more, f"batch-norm {how}"]
    protocol = "OpenSelfSup semi_classification" if said[0].startswith("OpenSelfSup") else ""
    number, _, rest = said[0].partition(" ")
    if re.fullmatch(r"\d+(\.\d+)*", number):
        protocol, said[0] = number, rest
    unlike = ("deviation: ", "fast: ")
    deviations = [one.partition(": ")[2] for one in said if one.startswith(unlike)]
    details = [one for one in said if one and not one.startswith(unlike)]
    # A choice is told at the end of a part, after a comma, or is a part of its own
    parts = [part for one in details for part in re.split(r", (?=chosen |rate chosen |best epoch on val)", one)]
    chosen = [part for part in parts if part.startswith(_CHOICES) or re.match(r"cost \S+ of \d+ chosen ", part)]
    return {
        "protocol": protocol,
        "deviations": deviations,
        "choice": ", ".join(chosen),
        "details": [part for part in parts if part not in chosen],
        "view": view,
        "precision": precision,
    }


def mark_headlines(rows: Sequence[Any]) -> list[Any]:
    """Rows of evaluations that are known by a number of neighbors, or of images a class: by the one closest to 20."""
    distances: dict[str, dict[str, int]] = {}
    for row in rows:
        if found := _COUNT.fullmatch(row.metric):
            distances.setdefault(row.eval, {})[row.metric] = abs(int(found[1]) - 20)
    known_by = {(name, min(of, key=of.__getitem__)) for name, of in distances.items()}
    return [dataclasses.replace(row, headline=True) if (row.eval, row.metric) in known_by else row for row in rows]
