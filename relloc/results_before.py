"""Converts lines of results.jsonl that older versions wrote to the present fields of a `Result`.

Format 1 had flat rows that did not name their format. Most facts stood in one sentence, the field
`protocol`, whose parts were separated by semicolons and which ended in "; VIEW, PRECISION; batch
norm: STATISTICS". This is the only module that takes such a sentence apart. Which table, column
and unit a number of format 1 gets is listed in `results_before.csv` beside this file.

Before 2026-11-29, lines of either format had no fields `series`, `k` and `spread`: only the name of
a metric said them. Before 2026-11-30, only a detail said which decoder JPEGs were decoded by.
"""

import csv
import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# How the parts of a sentence begin that say how a hyperparameter was chosen.
_CHOICE_PREFIXES = ("chosen", "rate chosen", "best epoch on val", "best of")
_SVM_CHOICE = re.compile(r"cost \S+ of \d+ chosen ")
_CHOICE_WITHIN_PART = re.compile(r", (?=chosen |rate chosen |best epoch on val)")
_DEVIATION_PREFIXES = ("deviation: ", "fast: ")
_PROTOCOL_NUMBER = re.compile(r"\d+(\.\d+)*")
# Ends of the names of metrics that describe how a number differs between random draws.
_SPREADS = ("std", "min", "max")
# Names of metrics that are measured at several k, such as `top1_k20` or `map_k1_cv`.
_SERIES = re.compile(r"(?P<name>\w+?)_k(?P<k>\d+)(?P<suffix>(_\w+)?)")
# Metrics with a number of neighbors, or of images per class, such as `top1_k20` or `map_k16`.
_METRIC_WITH_COUNT = re.compile(r"[a-z0-9]+_k(\d+)")
# The detail of rows that were measured by another decoder than libjpeg.
_DECODED_BY_NVJPEG = "JPEGs decoded by nvJPEG"
_REPORT_FIELDS = ("table", "column", "layer", "variant", "unit")


def convert(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a `Result` for the fields of a line in format 1.

    Raises:
        KeyError, TypeError: a field is missing, or not text where text is needed.
    """
    evaluation = fields["eval"]
    metric = fields["metric"]
    layer = fields["layer"]
    report_fields = _report_fields(f"{evaluation}/{metric}", layer)
    if not report_fields:  # an evaluation of the user's own: a table for itself
        report_fields = {"table": evaluation, "column": layer, "variant": metric}
    # In format 1 these had the same name on the run's own images and on ImageNet.
    if evaluation in ("knn", "label_free") and fields["dataset"] == "in1k":
        evaluation += "_in1k"
    return {
        **add_series(fields),
        **_facts(fields["protocol"]),
        "eval": evaluation,
        "kind": _kind(evaluation),
        **report_fields,
    }


def add_series(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a line with `series`, `k` and `spread`.

    Those that the line lacks are taken from the name of its metric.
    """
    metric = str(fields.get("metric"))
    from_name: dict[str, Any] = {}
    start, _, last = metric.rpartition("_")
    if last in _SPREADS:
        from_name["spread"] = last
        metric = start
    match = _SERIES.fullmatch(metric)
    if match:
        from_name["series"] = match["name"] + match["suffix"]
        from_name["k"] = int(match["k"])
    return {**from_name, **fields}


def add_decoder(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a line with `decoder`, where only its details name another decoder."""
    if "decoder" not in fields and _DECODED_BY_NVJPEG in (fields.get("details") or ()):
        return {**fields, "decoder": "nvJPEG"}
    return {**fields}


@functools.cache
def _rules() -> list[dict[str, str]]:
    """Returns the rows of results_before.csv; the first whose pattern `measured` fits applies.

    Curly brackets in the other columns stand for the layer and the named groups of the pattern.
    """
    path = Path(__file__)
    path = path.with_suffix(".csv")
    lines = path.read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(lines))


def _report_fields(measured: str, layer: str) -> dict[str, Any]:
    """Returns the fields that place EVALUATION/METRIC in reports; empty where no rule fits."""
    for rule in _rules():
        match = re.fullmatch(rule["measured"], measured)
        if not match:
            continue
        replacements = {"layer": layer, **match.groupdict()}
        fields: dict[str, Any] = {}
        for name in _REPORT_FIELDS:
            fields[name] = rule[name].format_map(replacements)
        fields["headline"] = rule["headline"] == "yes"
        fields["higher_is_better"] = True if rule["unit"] == "%" else None
        return fields
    return {}


def _kind(evaluation: str) -> str:
    if evaluation == "pretext":
        return "pretext"
    if evaluation.startswith("semisup"):
        return "fine-tuned"
    return "frozen"


def _facts(sentence: str) -> dict[str, Any]:
    """Returns protocol, deviations, choice, details, view and precision that a sentence states."""
    parts, view, precision = _split_sentence(sentence)

    # The first part begins with the protocol's number; one protocol had a name instead.
    protocol = "OpenSelfSup semi_classification" if parts[0].startswith("OpenSelfSup") else ""
    number, _, rest = parts[0].partition(" ")
    if _PROTOCOL_NUMBER.fullmatch(number):
        protocol = number
        parts[0] = rest

    deviations = []
    choices = []
    details = []
    for part in parts:
        if part.startswith(_DEVIATION_PREFIXES):
            _, _, deviation = part.partition(": ")
            deviations.append(deviation)
        elif part:
            # A choice is a part of its own, or stands at the end of another part after a comma.
            for clause in _CHOICE_WITHIN_PART.split(part):
                is_choice = clause.startswith(_CHOICE_PREFIXES) or _SVM_CHOICE.match(clause)
                (choices if is_choice else details).append(clause)
    return {
        "protocol": protocol,
        "deviations": deviations,
        "choice": ", ".join(choices),
        "details": details,
        "view": view,
        "precision": precision,
    }


def _split_sentence(sentence: str) -> tuple[list[str], str, str]:
    """Returns the parts of a sentence in order, and the view and precision named near its end."""
    before, separator, after = sentence.rpartition("; batch norm: ")
    if not separator:  # a sentence that does not follow relloc's own form
        return sentence.split("; "), "", ""
    *parts, view_and_precision = before.split("; ")
    view, _, precision = view_and_precision.rpartition(", ")
    statistics, *more = after.split("; ")
    parts += more
    # Statistics as trained are the normal case, and not worth a detail.
    if statistics != "statistics as trained":
        parts.append(f"batch-norm {statistics}")
    return parts, view, precision


def mark_headlines(rows: Sequence[Any]) -> list[Any]:
    """Returns the rows with `headline` set where the metric's count is the closest to 20.

    This concerns evaluations with one metric for each number of neighbors, or of images per class.
    """
    distances: dict[str, dict[str, int]] = {}  # by evaluation and metric
    for row in rows:
        match = _METRIC_WITH_COUNT.fullmatch(row.metric)
        if match:
            count = int(match[1])
            by_metric = distances.setdefault(row.eval, {})
            by_metric[row.metric] = abs(count - 20)
    headlines = set()
    for evaluation, by_metric in distances.items():
        closest = min(by_metric, key=by_metric.__getitem__)
        headlines.add((evaluation, closest))

    marked = []
    for row in rows:
        if (row.eval, row.metric) in headlines:
            row = dataclasses.replace(row, headline=True)
        marked.append(row)
    return marked
