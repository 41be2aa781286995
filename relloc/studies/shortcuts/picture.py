"""Draws the study of shortcuts: one panel for each shortcut, and the verdicts in words."""

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from relloc.figures.style import MOST_CATEGORIES, Look, category_looks, save_png, style
from relloc.geometry import CHANCE_PERCENT
from relloc.studies.shortcuts.estimates import Estimate, explained_percent, root_of_ratio
from relloc.studies.shortcuts.findings import Findings
from relloc.studies.shortcuts.questions import (
    Question,
    Strengths,
    horizontal_shift,
    lens_noise,
    radial_shift,
    shifts,
)
from relloc.studies.shortcuts.verdicts import Verdict

_WIDTH_OF_PANEL = 3.7  # inches
_HEIGHT_OF_PANEL = 2.9
_COLUMNS = 4
_CHARACTERS_OF_VERDICTS = 92
_LARGEST_FONT = 8  # points, of the verdicts
# Inches that a character takes at that size: DejaVu Sans, and the same in bold
_INCHES_PER_CHARACTER = (0.0615, 0.0695, 0.0615)
_SPREAD = 0.08  # of series that have points at the same places, so that intervals can be told apart
Panel = tuple[str, Callable[[Axes], None]]


def draw_findings(
    findings: Findings,
    verdicts: Sequence[Verdict],
    strengths: Strengths,
    path: Path,
    *,
    title: str,
) -> None:
    """Saves a PNG with a panel for each shortcut, with 95 % intervals, and a list of verdicts.

    Without answers of a network of the pretext task there are only the panels about features.
    """
    panels: list[Panel] = [
        ("place of a patch in its image", lambda axis: _draw_patches(axis, findings)),
        ("place of a cell in maps of whole images", lambda axis: _draw_maps(axis, findings)),
    ]
    if findings.asked:
        panels += _panels_of_answers(findings, strengths)
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    # The verdicts take the width of the picture below the panels.
    height_of_text = 0.2 + 0.2 * len(verdicts)
    width = _WIDTH_OF_PANEL * max(columns, 3)
    size = (width, _HEIGHT_OF_PANEL * rows + height_of_text)
    with style():
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(f"shortcuts: {title}")
        heights = [_HEIGHT_OF_PANEL] * rows + [height_of_text]
        places = figure.add_gridspec(rows + 1, columns, height_ratios=heights)
        for number, (name, draw) in enumerate(panels):
            row, column = divmod(number, columns)
            axis = figure.add_subplot(places[row, column])
            axis.set_title(name)
            draw(axis)
        _write_verdicts(figure.add_subplot(places[rows, :]), verdicts, width)
        save_png(figure, path)


def _panels_of_answers(findings: Findings, strengths: Strengths) -> list[Panel]:
    by_name = {question.name: question for question in findings.asked}

    def bars(*names: str) -> Callable[[Axes], None]:
        asked = [by_name[name] for name in names]
        return lambda axis: _draw_bars(axis, findings, asked)

    gaps = [name for name in by_name if name.startswith("gap_")]
    return [
        (
            "chromatic aberration in noise",
            lambda axis: _draw_lens(axis, findings, strengths, by_name),
        ),
        (
            "shifted channels in photographs",
            lambda axis: _draw_shifts(axis, findings, strengths, by_name),
        ),
        (
            "borders",
            bars("noise", "noise_black_border", "noise_mirrored_border", "photographs", "corner"),
        ),
        (
            "blocks of JPEG",
            bars("noise_smooth", "noise_jpeg", "noise_jpeg_shifted", "noise_jpeg_without_jitter"),
        ),
        (
            "continuity across borders of patches",
            bars("noise_smooth", "noise_smooth_gap_0", "photographs", *gaps),
        ),
        (
            "color treatments, with and without a lens",
            lambda axis: _draw_colors(axis, findings, by_name),
        ),
    ]


def _draw_patches(axis: Axes, findings: Findings) -> None:
    """Draws errors relative to the center's by layer, of all images and of the easiest tenth."""
    sources = findings.sources
    layers = list(dict.fromkeys(layer for _, layer in findings.patch_errors))
    for number, color in enumerate(findings.colors):
        places, of_all, of_easiest = [], [], []
        for place, layer in enumerate(layers):
            errors = findings.patch_errors[color, layer]
            places.append(place + _offset(number, len(findings.colors)))
            of_all.append(root_of_ratio(errors.all_error, errors.all_center, sources))
            easiest = errors.easiest()
            easy_sources = errors.easiest_of(sources)
            easy_errors = errors.other_error[easiest]
            easy_centers = errors.other_center[easiest]
            of_easiest.append(root_of_ratio(easy_errors, easy_centers, easy_sources))
        look = _look(number)
        _draw_line(axis, places, of_all, look, label=color)
        # Without intervals, which of so few images would hide everything else
        values = [each.value for each in of_easiest]
        axis.plot(places, values, **{**look, "linestyle": ":"}, markerfacecolor="none")
    axis.axhline(1, color="black", linestyle="--", linewidth=0.8)
    axis.set_xticks(range(len(layers)), layers)
    axis.set_ylabel("error relative to always the center\n(dotted: easiest tenth)")
    _add_legend(axis)


def _draw_maps(axis: Axes, findings: Findings) -> None:
    layers: list[str] = []
    for number, (images, by_layer) in enumerate(findings.map_errors.items()):
        sources = findings.sources_of_maps(images)
        found = [explained_percent(errors, sources) for errors in by_layer.values()]
        layers = list(by_layer)
        offset = _offset(number, len(findings.map_errors))
        places = [place + offset for place in range(len(found))]
        _draw_line(axis, places, found, _look(number), label=f"maps of {images}")
    axis.axhline(0, color="black", linestyle="--", linewidth=0.8)
    axis.set_xticks(range(len(layers)), layers)
    axis.set_ylabel("R² of the place, %")
    _add_legend(axis)


def _draw_lens(
    axis: Axes, findings: Findings, strengths: Strengths, by_name: dict[str, Question]
) -> None:
    """Draws the accuracy by the strength of the lens, and of each color treatment at the end."""
    fractions = [0.0, *strengths.lens]
    found = [findings.accuracy(by_name[lens_noise(each)]) for each in fractions]
    percent = [100 * each for each in fractions]
    _draw_line(axis, percent, found, _look(0), label="colors as trained")
    prefix = f"{lens_noise(strengths.lens[-1])}_"
    treated = [question for name, question in by_name.items() if name.startswith(prefix)]
    # Side by side and by their names, since they are all of the strongest lens
    step = percent[-1] / 4
    places = list(percent)
    names = [f"{each:g}" for each in percent]
    for number, question in enumerate(treated, start=1):
        place = percent[-1] + number * step
        places.append(place)
        names.append(textwrap.fill(question.color, 10))
        found = [findings.accuracy(question)]
        _draw_line(axis, [place], found, _look(number), label=f"colors {question.color}")
    _draw_chance(axis)
    axis.set_xlabel(
        f"green closer to the center by, %; by names: {percent[-1]:g} % with such colors",
        fontsize=7,
    )
    axis.set_xticks(places, names, rotation=30, ha="right", rotation_mode="anchor")


def _draw_shifts(
    axis: Axes, findings: Findings, strengths: Strengths, by_name: dict[str, Question]
) -> None:
    series = (("inward", radial_shift), ("to the right", horizontal_shift))
    places = [0, *shifts(strengths)]
    places.sort()
    for number, (label, name) in enumerate(series):
        found = []
        for shift in places:
            question = by_name[name(shift) if shift else "photographs"]
            found.append(findings.accuracy(question))
        offset = _offset(number, len(series))
        beside = [place + offset for place in places]
        _draw_line(axis, beside, found, _look(number), label=f"green {label}")
    _draw_chance(axis)
    axis.set_xticks(places)
    axis.set_xlabel("shift, px")
    _add_legend(axis)


def _draw_colors(axis: Axes, findings: Findings, by_name: dict[str, Question]) -> None:
    """Draws photographs under each color treatment, beside the same ones through a lens."""
    names = [name for name in by_name if name.startswith("photographs_")]
    colors = ["as trained"]
    plain = [findings.accuracy(by_name["photographs"])]
    lens = [findings.accuracy(by_name["lens"])]
    for name in names:
        color = by_name[name].color
        colors.append(color)
        plain.append(findings.accuracy(by_name[name]))
        lens.append(findings.accuracy(by_name[f"lens_{color}"]))
    places = range(len(colors))
    series = {"photographs": plain, "through a further lens": lens}
    for number, (label, found) in enumerate(series.items()):
        beside = [place + 0.2 * (number - 0.5) for place in places]
        look = {**_look(number), "linestyle": "none"}
        _draw_line(axis, beside, found, look, label=label)
    _draw_chance(axis)
    axis.set_xticks(list(places), colors)
    _add_legend(axis)


def _draw_bars(axis: Axes, findings: Findings, asked: Sequence[Question]) -> None:
    places = range(len(asked))
    found = [findings.accuracy(question) for question in asked]
    of_photographs = _look(0)["color"]
    colors = [of_photographs if each.is_about_photographs else "0.75" for each in asked]
    axis.bar(
        places,
        [each.value for each in found],
        color=colors,
        yerr=[_shown_half_width(each) for each in found],
        capsize=2,
    )
    for place, estimate in zip(places, found, strict=True):
        # Above the bar and its interval
        height = estimate.value + _shown_half_width(estimate)
        axis.annotate(
            f"{estimate.value:.1f}",
            (place, height),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            fontsize=7,
        )
    _draw_chance(axis)
    axis.margins(y=0.12)
    axis.grid(visible=False, axis="x")
    labels = [textwrap.fill(question.title, 12) for question in asked]
    axis.set_xticks(list(places), labels, fontsize=6.5)


def _draw_line(
    axis: Axes,
    places: Sequence[float],
    found: Sequence[Estimate],
    look: Look,
    *,
    label: str,
) -> None:
    """Draws points with their intervals."""
    axis.errorbar(
        places,
        [each.value for each in found],
        yerr=[_shown_half_width(each) for each in found],
        capsize=2,
        label=label,
        **look,
    )


def _look(number: int) -> Look:
    """Returns the look of a series; of more than can be told apart, they begin again."""
    return category_looks(MOST_CATEGORIES)[number % MOST_CATEGORIES]


def _offset(number: int, n_series: int) -> float:
    """Returns how far the points of a series stand beside their places."""
    return (number - (n_series - 1) / 2) * _SPREAD


def _add_legend(axis: Axes) -> None:
    """Adds a legend above everything that is drawn, so that it covers no interval."""
    _, labels = axis.get_legend_handles_labels()
    columns = 2
    lines = -(-len(labels) // columns)
    low, high = axis.get_ylim()
    # A line takes about 7 % of the height of a panel
    axis.set_ylim(low, high + (0.03 + 0.07 * lines) * (high - low))
    axis.legend(ncols=columns, loc="upper center")


def _draw_chance(axis: Axes) -> None:
    axis.axhline(CHANCE_PERCENT, color="black", linestyle="--", linewidth=0.8)
    axis.set_ylabel("pretext accuracy, % (chance dashed)")


def _shown_half_width(estimate: Estimate) -> float:
    # An interval of which nothing is known is not drawn.
    return estimate.half_width if estimate.half_width < float("inf") else 0.0


def _write_verdicts(axis: Axes, verdicts: Sequence[Verdict], width: float) -> None:
    """Writes a line for each verdict; `width` is that of the picture in inches."""
    axis.set_axis_off()
    lines = []
    for verdict in verdicts:
        name = textwrap.shorten(verdict.full_title, _CHARACTERS_OF_VERDICTS, placeholder="…")
        lines.append((name, verdict.verdict_text, verdict.number_text))
    starts, size = _columns_of_verdicts(lines, width)
    step = 1 / max(1, len(lines))
    for number, line in enumerate(lines):
        height = 1 - (number + 0.5) * step
        for start, text, weight in zip(starts, line, ("normal", "bold", "normal"), strict=True):
            axis.text(start, height, text, fontsize=size, va="center", fontweight=weight)


def _columns_of_verdicts(
    lines: Sequence[tuple[str, str, str]], width: float
) -> tuple[list[float], float]:
    """Returns where the three columns begin, in parts of `width` (inches), and the font's size."""
    starts = []
    total = 0.0
    for column, inches in enumerate(_INCHES_PER_CHARACTER):
        longest = max((len(line[column]) for line in lines), default=0)
        starts.append(total)
        # Two characters lie between columns
        total += (longest + 2) * inches
    # Longer lines are written smaller
    scale = min(1.0, width / total)
    return [start * scale / width for start in starts], _LARGEST_FONT * scale
