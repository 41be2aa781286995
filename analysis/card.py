# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Are our numbers those of the published card?
#
# Each number of the published card: as published, with the tolerance within which two trainings of
# the same recipe differ (bars), and ours where it was measured on the same images by the same
# protocol. Relative location, random and supervised weights have a panel each.

# %% [markdown]
# `RELLOC_RUNS` names the folder of runs, or `RELLOC_MLFLOW` a store in its place, and
# `RELLOC_SELECT` chooses among them, such as `sweep=gaps eval=knn grid.gap_px=0,21`. Open this in
# Jupyter through jupytext, or run it by Python:
#
#     python analysis/card.py
#
# saves the figures in `figures` in the folder of runs, as PNG, SVG and PDF.

# %%
import matplotlib.pyplot as plt
from draw import legend_below
from load import as_frame, figures_folder, load_measured

from relloc.figures.style import TWO_COLUMNS, save, use_style
from relloc.reports.compare import ABOVE, BELOW, INSIDE, make_entries
from relloc.reports.published import (
    CARD,
    CARD_OSS,
    RANDOM,
    SUPERVISED,
    card_parts,
    parts_of,
    published_numbers,
)

use_style()
# The panels: which weights of ours stand beside which published rows, in order of preference
PANELS = {"pretrained": (CARD, CARD_OSS), "random": (RANDOM,), "supervised": (SUPERVISED,)}
WEIGHTS = {"random": "random", "torchvision": "supervised"}
NOT_BUILT = "not built"
entries = [entry for entry in make_entries(load_measured()) if entry.fills_card]

# %% [markdown]
# All cells of the card:


# %%
def published(panel, table, column):
    """Returns the published numbers of a cell: of the first row that has it."""
    for row in PANELS[panel]:
        found = [
            number
            for number in published_numbers()
            if (number.row, number.table, number.column) == (row, table, column)
            and not number.variant
        ]
        if found:
            return found
    return []


cells = []
for table in dict.fromkeys(part.table for part in card_parts()):
    for part in parts_of(table):
        for column in part.columns:
            for panel in PANELS:
                numbers = published(panel, table, column)
                if not numbers:
                    continue
                ours = [
                    entry
                    for entry in entries
                    if (entry.result.table, entry.result.column) == (table, column)
                    and WEIGHTS.get(entry.result.checkpoint, "pretrained") == panel
                    and entry.mark
                ]
                line: dict[str, object] = {"table": table, "column": column, "weights": panel}
                line["published"] = " / ".join(number.printed for number in numbers)
                line["tolerance"] = numbers[0].tolerance
                line["low"] = min(number.value for number in numbers) - numbers[0].tolerance
                line["high"] = max(number.value for number in numbers) + numbers[0].tolerance
                line["ours"] = [entry.result.value for entry in ours]
                line["marks"] = [entry.mark for entry in ours]
                line["evaluation"] = part.evaluation or NOT_BUILT
                cells.append(line)
cells = as_frame(cells)
shown = cells.assign(
    ours=[", ".join(f"{value:.2f}" for value in values) or "—" for values in cells["ours"]],
    marks=cells["marks"].map(" ".join),
)
shown.drop(columns=["low", "high"]).set_index(["table", "column", "weights"])

# %%
rows = list(dict.fromkeys(zip(cells["table"], cells["column"], strict=True)))
tables = list(dict.fromkeys(table for table, _ in rows))
# From the top down, with a line for the title of each table
heights, titles, y = {}, {}, 0
for table in tables:
    titles[table] = -y
    y += 1
    for row in rows:
        if row[0] == table:
            heights[row] = -y
            y += 1
    y += 0.5
LOOKS = {INSIDE: ("o", "#0072B2", "inside"), ABOVE: ("^", "#009E73", "above")}
LOOKS[BELOW] = ("v", "#D55E00", "below")
figure, axes = plt.subplots(
    1, len(PANELS), figsize=(TWO_COLUMNS, 0.6 + 0.135 * y), sharey=True, layout="constrained"
)
for axis, panel in zip(axes, PANELS, strict=True):
    for _, cell in cells[cells["weights"] == panel].iterrows():
        height = heights[cell["table"], cell["column"]]
        middle = (cell["low"] + cell["high"]) / 2
        axis.plot(
            [cell["low"], cell["high"]],
            [height, height],
            color="0.7",
            linewidth=4,
            solid_capstyle="butt",
            label="published ± tolerance",
        )
        axis.plot(middle, height, "k|", markersize=5)
        for value, mark in zip(cell["ours"], cell["marks"], strict=True):
            marker, color, word = LOOKS[mark]
            axis.plot(value, height, marker, color=color, label=f"ours, {word}")
    axis.set(title=panel, xlabel="top-1, mAP, AP, mIoU (%)", xlim=(0, 100))
axes[0].set_yticks(
    [*titles.values(), *heights.values()],
    [*titles, *(f"{column}" for _, column in heights)],
    fontsize=5.5,
)
for label, text in zip(axes[0].get_yticklabels(), [*titles, *heights], strict=True):
    if text in titles:
        label.set_fontweight("bold")
axes[0].set_ylim(-y, 1)
legend_below(figure, list(axes), columns=4)
for file in save(figure, figures_folder(), "card"):
    print("saved", file)

# %%
ours = cells[cells["weights"] == "pretrained"]
n_cells = len(ours)
measured = ours[ours["ours"].map(len) > 0]
marks = [mark for several in measured["marks"] for mark in several]
controls = cells[cells["weights"] != "pretrained"]
control_marks = [mark for several in controls["marks"] for mark in several]
missing = sorted(set(ours["evaluation"]) - set(measured["evaluation"]) - {NOT_BUILT})
answer = (
    f"**{len(measured)} of the {n_cells} published numbers of relative location have been measured "
    f"on their images: {marks.count(INSIDE)} of {len(marks)} lie inside the tolerance, "
    f"{marks.count(ABOVE)} above and {marks.count(BELOW)} below it**; of random and supervised "
    f"weights {control_marks.count(INSIDE)} of {len(control_marks)} lie inside. "
)
if missing:
    answer += f"Not measured: {', '.join(missing)}."
print(answer)
