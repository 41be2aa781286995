"""Draws the reliability diagram."""

from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from relloc.figures.style import category_looks, save_png, style
from relloc.studies.pretext_accuracy.reliability import Reliability

_HISTOGRAM_BINS = 40


def draw_reliability(
    found: Reliability, confidences: Float[np.ndarray, "n"], path: Path, *, title: str
) -> None:
    """Saves a PNG with the accuracy at each confidence, and how often confidences occur."""
    with style():
        figure = Figure(figsize=(3.6, 4.2), layout="constrained")
        upper, lower = figure.subplots(2, 1, height_ratios=[3, 1], sharex=True)
        [look] = category_looks(1)
        upper.plot([0, 100], [0, 100], color="0.45", linestyle=":", label="calibrated")
        upper.plot(100 * found.confidences, 100 * found.accuracies, label="network", **look)
        upper.set_ylim(0, 100)
        upper.set_xlim(0, 100)
        upper.set_ylabel("right answers, %")
        figure.suptitle(title, fontsize=8)
        upper.legend(loc="upper left")
        edges = np.linspace(0, 100, _HISTOGRAM_BINS + 1)
        lower.hist(100 * confidences, bins=edges.tolist(), color=look["color"])
        lower.set_xlabel("confidence: probability of the answer, %")
        lower.set_ylabel("pairs")
        save_png(figure, path)
