"""The style of figures under its former name, for notebooks that import it from here.

It is `relloc.figures.style`, which studies and evaluations have in common with reports.
"""

from relloc.figures.style import (
    FORMATS,
    MARKERS,
    MOST_CATEGORIES,
    MOST_ORDERED,
    ONE_COLUMN,
    STYLE_FILE,
    TWO_COLUMNS,
    Look,
    axis_label,
    category_looks,
    control_look,
    ink_on,
    mark_chance,
    ordered_looks,
    save,
    save_as,
    style,
    use_style,
)

__all__ = [
    "FORMATS",
    "MARKERS",
    "MOST_CATEGORIES",
    "MOST_ORDERED",
    "ONE_COLUMN",
    "STYLE_FILE",
    "TWO_COLUMNS",
    "Look",
    "axis_label",
    "category_looks",
    "control_look",
    "ink_on",
    "mark_chance",
    "ordered_looks",
    "save",
    "save_as",
    "style",
    "use_style",
]
