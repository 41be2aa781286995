"""Lines of results.jsonl as they were before they said their format: flat rows with a sentence as protocol.

The sentence ended in "; VIEW, PRECISION; batch norm: …". This module is the only one that takes such text apart.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

Row = TypeVar("Row")
_CHOSEN = "chosen without the test set"
_LINEAR = {
    "linear": "Linear, top-1",
    "linear_fast": "Linear on features computed once, top-1",
    "linear_in1k": "Linear, ImageNet protocol, top-1",
    "linear_avgpool": "Linear, ImageNet protocol, top-1",
    "linear_places205": "Linear, Places205 protocol, top-1",
    "linear_inat18": "Linear, iNaturalist 2018 protocol, top-1",
}
_SVM, _LOW_SHOT = "Linear SVM, VOC07 protocol, mAP", "Low-shot SVM, VOC07 protocol, mAP"
_SEMISUP = "Fine-tuned on 1 % and 10 % of the labels"
# Evaluation, metric -> fields; the first that fits. In curly brackets: the layer, and the groups of both patterns
_RULES: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
    ("voc07_svm", "map", {"table": _SVM, "column": "{layer}", "headline": True}),
    ("voc07_svm", "map_cv", {"column": "{layer}"}),
    ("voc07_svm", "map_best", {"table": _SVM, "column": "best layer"}),
    ("voc07_svm", "map_best_cv", {"table": _SVM, "column": "best layer", "variant": _CHOSEN}),
    ("voc07_low_shot", r"map_k(?P<k>\d+)", {"table": _LOW_SHOT, "column": "k={k}"}),
    ("voc07_low_shot", r"map_k(?P<k>\d+)_cv", {"table": _LOW_SHOT, "column": "k={k}", "variant": _CHOSEN}),
    ("voc07_low_shot", r"map_k(?P<k>\d+)_(?P<what>std|min|max)", {"column": "k={k}", "variant": "{what} over draws"}),
    ("linear_avgpool", "top1_best", {"column": "{layer}"}),
    ("linear_avgpool", "top1", {"column": "{layer}", "variant": "last epoch", "headline": True}),
    ("linear.*", "top1", {"column": "{layer}", "headline": True}),
    ("linear.*", "top1_tuned", {"column": "{layer}", "variant": _CHOSEN}),
    ("knn", r"top1_k(?P<k>\d+)", {"table": "Nearest neighbors, top-1", "column": "k={k}", "variant": "{layer}"}),
    (r"semisup_(?P<part>\d+)", "top1", {"table": _SEMISUP, "column": "{part} % top-1", "headline": True}),
    (r"semisup_(?P<part>\d+)", "top5", {"table": _SEMISUP, "column": "{part} % top-5"}),
    (
        r"semisup_(?P<part>\d+)",
        r"top(?P<top>\d)_tuned",
        {"table": _SEMISUP, "column": "{part} % top-{top}", "variant": _CHOSEN},
    ),
    ("label_free", "rankme", {"column": "{layer}", "variant": "RankMe", "unit": "directions", "headline": True}),
    ("label_free", "alpha_req", {"column": "{layer}", "variant": "alpha-ReQ", "unit": "exponent"}),
    ("pretext", "top1", {"table": "Pretext accuracy, top-1", "column": "held out", "layer": "", "headline": True}),
)
_CHOICES = ("chosen", "rate chosen", "best epoch on val", "best of")


def convert(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `Result` from those of a line without a format.

    Raises:
        KeyError, TypeError: a field is missing, or not text where text is needed.
    """
    evaluation, metric, layer = fields["eval"], fields["metric"], fields["layer"]
    placed = next(_placed(evaluation, metric, layer), {"table": evaluation, "column": layer, "variant": metric})
    # These had one name on the run's own images and on ImageNet
    if evaluation in ("knn", "label_free") and fields["dataset"] == "in1k":
        evaluation += "_in1k"
    return {**fields, **_facts(fields["protocol"]), "eval": evaluation, "kind": _kind(evaluation), **placed}


def _placed(evaluation: str, metric: str, layer: str) -> Iterator[dict[str, Any]]:
    for of_evaluation, of_metric, values in _RULES:
        named, measured = re.fullmatch(of_evaluation, evaluation), re.fullmatch(of_metric, metric)
        if named and measured:
            words = named.groupdict() | measured.groupdict() | {"layer": layer}
            placed = {key: text.format(**words) if isinstance(text, str) else text for key, text in values.items()}
            if evaluation.startswith("linear"):
                placed["table"] = _LINEAR.get(evaluation, evaluation)
            if evaluation == "label_free":
                placed |= {"table": "Label-free measures", "higher_is_better": None}
            yield placed


def _kind(evaluation: str) -> str:
    if evaluation == "pretext":
        return "pretext"
    return "fine-tuned" if evaluation.startswith("semisup") else "frozen"


def _facts(sentence: str) -> dict[str, Any]:
    """Protocol, deviations, choice, details, view and precision of a sentence."""
    before, found, after = sentence.rpartition("; batch norm: ")
    view, precision = "", ""
    said = sentence.split("; ")
    if found:
        *said, seen = before.split("; ")
        view, _, precision = seen.rpartition(", ")
        how, *more = after.split("; ")
        said += more
        if how != "statistics as trained":
            said.append(f"batch-norm {how}")
    number, _, rest = said[0].partition(" ")
    protocol = number if re.fullmatch(r"\d+(\.\d+)*", number) else ""
    if protocol:
        said[0] = rest
    elif said[0].startswith("OpenSelfSup"):
        protocol = "OpenSelfSup semi_classification"
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


def mark_headlines(rows: Sequence[Row]) -> list[Row]:
    """Rows of evaluations that are known by a number of neighbors, or of images a class: by the one closest to 20."""
    counts: dict[str, list[int]] = {}
    for row in rows:
        if (count := _count(row)) is not None:
            counts.setdefault(row.eval, []).append(count)  # type: ignore[attr-defined]
    closest = {name: min(of, key=lambda count: abs(count - 20)) for name, of in counts.items()}
    return [
        dataclasses.replace(row, headline=True)  # type: ignore[type-var]
        if _count(row) == closest.get(row.eval, -1)  # type: ignore[attr-defined]
        else row
        for row in rows
    ]


def _count(row: Any) -> int | None:
    """k of `top1_k20` or `map_k16`; None for a metric without."""
    found = re.fullmatch(r"[a-z0-9]+_k(\d+)", row.metric)
    return int(found[1]) if found else None
