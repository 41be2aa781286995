"""Shares of right answers with intervals that are clustered by image: rows, tables and pictures."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int64, Shaped
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from relloc.figures.style import category_looks, mark_chance, save_png, style
from relloc.geometry import CHANCE_PERCENT
from relloc.pretext.held_out import clustered_ratio
from relloc.results import Score, known_interval
from relloc.studies.csv_tables import write_table
from relloc.terminal import quantity

# A picture of more lines could not be read.
_MOST_LINES = 40
_INCHES_PER_LINE = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """The accuracy over some pairs, with the ends of its 95 % interval; all in percent.

    `name`: which pairs these are. `pairs`, `images`: how many, and of how many images.
    """

    name: str
    percent: float
    low: float
    high: float
    pairs: int
    images: int

    @property
    def in_words(self) -> str:
        """The accuracy as a phrase, with its interval where that tells something, and chance."""
        pairs = quantity(self.pairs, "pair", commas=True)
        text = f"{self.percent:.1f} % of {pairs} right"
        if interval := known_interval(self.low, self.high):
            low, high = interval
            text += f" (95 % interval {low:.1f} to {high:.1f})"
        return f"{text}, chance is {CHANCE_PERCENT} %"

    def score(
        self,
        metric: str,
        details: tuple[str, ...] = (),
        *,
        table: str = "",
        column: str = "accuracy",
        variant: str = "",
    ) -> Score:
        """Returns the accuracy as a result; `table`, `column` and `variant` as in a `Result`."""
        return Score(
            metric=metric,
            value=self.percent,
            low=self.low,
            high=self.high,
            n=self.images,
            table=table,
            column=column if table else "",
            variant=variant,
            details=(quantity(self.pairs, "pair", commas=True), *details),
        )


def share_of(
    name: str,
    right: Bool[np.ndarray, "grids pairs"],
    chosen: Bool[np.ndarray, "grids pairs"],
    images: Int64[np.ndarray, "grids"],
    sources: Shaped[np.ndarray, "grids"],
) -> Share | None:
    """Returns the accuracy over the chosen pairs, or None where no pair is chosen.

    The interval is clustered by source (`relloc.pretext.held_out`). Where all answers are right, or
    none, nothing varies, and it is the exact one for a single answer of each source (Clopper and
    Pearson, 1934).

    Args:
        name: which pairs are chosen.
        right: whether the answer about each pair of each grid is right.
        chosen: which pairs count.
        images: the number of the image of each grid.
        sources: the name of the source of the image of each grid.
    """
    # Grids without a chosen pair say nothing, and neither do their sources.
    has_pairs = chosen.any(axis=1)
    if not has_pairs.any():
        return None
    hits = (right & chosen)[has_pairs].sum(axis=1)
    pairs = chosen[has_pairs].sum(axis=1)
    sources_of_pairs = sources[has_pairs].tolist()
    ratio, half_width = clustered_ratio(hits, pairs, sources_of_pairs)
    low = max(0.0, ratio - half_width)
    high = min(1.0, ratio + half_width)
    # 2.5 % on each side are left out, as everywhere, although one side is empty here.
    least_share_of_right = 0.025 ** (1 / len(set(sources_of_pairs)))
    if ratio == 1:
        low = least_share_of_right
    elif ratio == 0:
        high = 1 - least_share_of_right
    return Share(
        name=name,
        percent=100 * ratio,
        low=100 * low,
        high=100 * high,
        pairs=int(pairs.sum()),
        images=len(np.unique(images[has_pairs])),
    )


def write_shares(shares: Sequence[Share], path: Path, *, of: str) -> None:
    """Writes a CSV table with a line for each share; `of` heads the column of names."""
    header = [of, "accuracy_percent", "low", "high", "pairs", "images"]
    lines = []
    for share in shares:
        numbers = [round(value, 3) for value in (share.percent, share.low, share.high)]
        lines.append([share.name, *numbers, share.pairs, share.images])
    write_table(header, lines, path)


def draw_shares(shares: Sequence[Share], path: Path, *, title: str) -> None:
    """Saves a PNG of accuracies with their intervals, and chance as a dotted line.

    Of more than 40 the best and the worst are shown, in order of accuracy; others keep their order.
    """
    shown = list(shares)
    if len(shown) > _MOST_LINES:
        by_accuracy = sorted(shown, key=lambda share: -share.percent)
        half = _MOST_LINES // 2
        shown = [*by_accuracy[:half], *by_accuracy[-half:]]
        title += f"\nthe best {half} and the worst {half} of {len(shares)}"
    with style():
        height = 1.1 + _INCHES_PER_LINE * len(shown)
        figure = Figure(figsize=(5.5, height), layout="constrained")
        _draw_lines(figure.add_subplot(), shown, title)
        save_png(figure, path)


def _draw_lines(axis: Axes, shown: Sequence[Share], title: str) -> None:
    """Draws a line for each share, the first on top."""
    [look] = category_looks(1)
    highest = 50.0
    for line, share in enumerate(shown):
        if interval := known_interval(share.low, share.high):
            axis.plot(interval, [line, line], color=look["color"])
            highest = max(highest, share.high)
        highest = max(highest, share.percent)
        axis.plot(share.percent, line, **look)
    names = []
    for share in shown:
        names.append(f"{share.name} ({quantity(share.pairs, 'pair', commas=True)})")
    axis.set_yticks(range(len(shown)), names)
    # The first share stands at the top.
    axis.set_ylim(len(shown) - 0.4, -0.6)
    mark_chance(axis, CHANCE_PERCENT, upright=True)
    axis.set_xlim(0, highest + 2)
    axis.set_xlabel("right answers, %, with 95 % intervals; dotted: chance")
    axis.set_title(title)
    axis.grid(visible=False, axis="y")
