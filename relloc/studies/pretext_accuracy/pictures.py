"""Draws the reliability diagram."""

from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from relloc.files import writing
from relloc.studies.pretext_accuracy.reliability import Reliability

_HISTOGRAM_BINS = 40


def draw_reliability(
    found: Reliability, confidences: Float[np.ndarray, "n"], path: Path, *, title: str
) -> None:
    """Saves a PNG with the accuracy at each confidence, and how often confidences occur."""
    figure = Figure(figsize=(6, 7), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=[3, 1], sharex=True)
    upper.plot([0, 100], [0, 100], color="gray", linestyle="--", linewidth=1, label="calibrated")
    upper.plot(
        100 * found.confidences,
        100 * found.accuracies,
        "o-",
        color="tab:blue",
        markersize=5,
        label="network",
    )
    upper.set_ylim(0, 100)
    upper.set_xlim(0, 100)
    upper.set_ylabel("right answers, %")
    upper.set_title(title, fontsize=11, parse_math=False)
    upper.grid(alpha=0.3)
    upper.legend(loc="upper left", fontsize=9)
    edges = np.linspace(0, 100, _HISTOGRAM_BINS + 1)
    lower.hist(100 * confidences, bins=edges.tolist(), color="tab:blue")
    lower.set_xlabel("confidence: probability of the answer, %")
    lower.set_ylabel("pairs")
    lower.grid(alpha=0.3)
    with writing(path) as file:
        figure.savefig(file, dpi=110, format="png")
