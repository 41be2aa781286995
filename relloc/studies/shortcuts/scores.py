"""Turns findings into scores: every number with all its names in fields."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from relloc.geometry import CHANCE_PERCENT
from relloc.results import Score
from relloc.studies.shortcuts.estimates import Estimate, explained_percent, root_mean
from relloc.studies.shortcuts.findings import NETWORK, Findings, Origin
from relloc.studies.shortcuts.position import Errors
from relloc.studies.shortcuts.questions import AS_TRAINED, Question
from relloc.studies.shortcuts.reading import SinglePatches
from relloc.studies.shortcuts.verdicts import Verdict
from relloc.terminal import quantity

_ACCURACIES = "Shortcuts: pretext accuracy, top-1"
_EFFECTS = "Shortcuts: effects"
_PATCHES = "Shortcuts: place of a patch in its image"
_MAPS = "Shortcuts: place of a cell in the map of an image"
_INTERVAL = "95 % t interval, clustered by source image"
_SIDES = "parts of the image's sides"


def make_scores(findings: Findings, verdicts: Sequence[Verdict]) -> list[Score]:
    """Returns accuracies, errors of positions, and the effect of each shortcut."""
    scores = []
    for question in findings.asked:
        score = _of_question(question, findings.accuracy(question))
        scores.append(_with_origin(score, findings.origin_of(question)))
    for (color, layer), errors in findings.patch_errors.items():
        for score in _of_patches(errors, findings.sources, color, layer, findings.single):
            scores.append(_with_origin(score, findings.origin_of_patches))
    for images, by_layer in findings.map_errors.items():
        sources = findings.sources_of_maps(images)
        for layer, errors in by_layer.items():
            score = _of_maps(errors, sources, images, layer)
            scores.append(_with_origin(score, findings.origin_of_maps(images)))
    for verdict in verdicts:
        scores.append(_with_origin(_of_verdict(verdict), verdict.origin))
    return scores


def _with_origin(score: Score, origin: Origin) -> Score:
    return dataclasses.replace(score, **vars(origin))


def _score(
    estimate: Estimate,
    *,
    metric: str,
    table: str,
    column: str,
    variant: str,
    details: Sequence[str],
    unit: str = "%",
    layer: str = "",
) -> Score:
    """Returns a score of an estimate; where nothing is known of an interval, it has none."""
    is_known = math.isfinite(estimate.half_width)
    sources = quantity(estimate.sources, "source")
    about_interval = f"{_INTERVAL}: {sources}" if is_known else f"{sources}, so no interval"
    return Score(
        metric=metric,
        value=estimate.value,
        low=estimate.low if is_known else None,
        high=estimate.high if is_known else None,
        n=estimate.n,
        layer=layer,
        table=table,
        column=column,
        variant=variant,
        unit=unit,
        # Neither is better: a shortcut is a finding about images and network.
        higher_is_better=None,
        details=(*details, about_interval),
    )


def _of_question(question: Question, accuracy: Estimate) -> Score:
    colors = question.color
    details = [
        f"jitter and batch norm as trained, colors {colors}; chance is {CHANCE_PERCENT} %",
    ]
    if not question.is_about_photographs:
        details.append("images of noise, none of the data set")
    if colors != AS_TRAINED:
        details.append("the network was trained with its own treatment of colors")
    return _score(
        accuracy,
        metric=f"top1_{question.name}",
        table=_ACCURACIES,
        column="photographs" if question.is_about_photographs else "noise",
        variant=question.title,
        details=details,
    )


def _of_patches(
    errors: Errors, sources: Sequence[str], color: str, layer: str, single: SinglePatches
) -> Iterator[Score]:
    """Yields root mean squared errors of a regressor, beside those of the center."""
    is_network = layer == NETWORK
    regressor = "ridge regression on the mean of a layer's maps over rows and columns"
    metric_end = color
    if is_network:
        regressor = "a small network trained from the patches"
        metric_end = f"{color}_network"
    details = (
        regressor,
        f"{single.count} patches of {single.patch_px} px an image, anywhere in it, at a short side "
        f"of {single.short_px} px",
        "coordinates of a patch's center in parts of the image's height and width",
    )
    easiest = errors.easiest()
    sources_of_easiest = errors.easiest_of(sources)
    tenth = "easiest tenth of the images"
    # The errors of the center are on the same patches.
    rows: tuple[tuple[str, str, Any, Sequence[str]], ...] = (
        ("rmse", "all images", errors.all_error, sources),
        ("rmse_of_center", "all images, always the center", errors.all_center, sources),
        ("rmse_easiest", tenth, errors.other_error[easiest], sources_of_easiest),
        (
            "rmse_of_center_easiest",
            f"{tenth}, always the center",
            errors.other_center[easiest],
            sources_of_easiest,
        ),
    )
    for name, words, squared, of_images in rows:
        of_these = details
        if "easiest" in name:
            chosen = "chosen by one half of their patches, measured on the other"
            of_these = (*details, chosen)
        yield _score(
            root_mean(squared, of_images),
            metric=f"position_{name}_{metric_end}",
            unit=_SIDES,
            table=_PATCHES,
            column=layer,
            variant=f"colors {color}, {words}",
            layer="" if is_network else layer,
            details=of_these,
        )
    yield _score(
        explained_percent(errors, sources),
        metric=f"position_explained_{metric_end}",
        unit="% of the center's squared error",
        table=_PATCHES,
        column=layer,
        variant=f"colors {color}, explained",
        layer="" if is_network else layer,
        details=details,
    )


def _of_maps(errors: Errors, sources: Sequence[str], images: str, layer: str) -> Score:
    details = [
        "ridge regression of the center of a cell, of up to 8 x 8 evenly spaced cells a map",
        "0 is the error of always answering the center",
    ]
    if images != "photographs":
        details.append("images of noise, none of the data set")
    return _score(
        explained_percent(errors, sources),
        metric=f"position_r2_{images}",
        unit="% of the variance",
        table=_MAPS,
        column=layer,
        variant=f"maps of {images}",
        layer=layer,
        details=details,
    )


def _of_verdict(verdict: Verdict) -> Score:
    score = _score(
        verdict.effect,
        metric=f"effect_{verdict.shortcut}",
        unit=verdict.unit,
        table=_EFFECTS,
        column="effect",
        # The layer stands in `choice` alone: networks have their best at different ones, and their
        # effects are to be compared.
        variant=verdict.title,
        details=(f"verdict: {verdict.verdict_text}", verdict.meaning),
    )
    return dataclasses.replace(score, headline=True, choice=verdict.choice)
