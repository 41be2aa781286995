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
# # Does it matter what was swept, more than the seed does?
#
# `python -m relloc.report sweep=NAME` has all means of a sweep. Here each metric and layer of each
# sweep, of gap and jitter for example, has two numbers: how much results differ between settings,
# and how much between seeds.
#
# The notebook reads every sweep below `RELLOC_RUNS` (or `runs/`). Open it in Jupyter through
# jupytext, or run `python analysis/sweep.py`, which saves its figure in `figures` in the folder of
# runs, as PNG, SVG and PDF.

# %%
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from load import figures_folder, runs_folder

from relloc.figures.style import axis_label, ordered_looks, save, use_style
from relloc.reports.sweep import mean_tables, our_lines, read_sweep
from relloc.results import RESULTS_FILE
from relloc.sweeps.sweep import SWEEP_FILE, Sweep

use_style()
# By sweep and metric: the mean, standard deviation and count over seeds of each setting and layer
tables = {}
for file in sorted(runs_folder().glob(f"sweeps/*/{SWEEP_FILE}")):
    points = []
    for point in Sweep(file.parent).points():
        if (point.folder / RESULTS_FILE).exists():
            points.append(point)
    if not points:
        continue
    # All of them have results, so their states are not shown
    states = ["" for _ in points]
    numbers = read_sweep(file.parent.name, points, states)
    for title, table in mean_tables(numbers):
        tables[numbers.name, title] = our_lines(numbers, table)
if not tables:
    raise FileNotFoundError(
        f"no sweep with results below {runs_folder().resolve()}: run one, or set RELLOC_RUNS"
    )

# %% [markdown]
# `settings` is the standard deviation of the means. `seeds` is that of seeds within a setting,
# pooled over settings (none where there is one seed). If settings did not matter, the means of n
# seeds would have a standard deviation of `seeds` / √n.

# %%
lines = []
for (sweep, title), ours in tables.items():
    for layer in ours["mean"].columns:
        means = ours["mean", layer]
        variances = ours["std", layer] ** 2
        line = {
            "sweep": sweep,
            "metric": title,
            "layer": layer,
            "settings": means.std(),
            "seeds": variances.mean() ** 0.5,
            "n": ours["count", layer].mean(),
            "highest": means.idxmax(),
        }
        lines.append(line)
differences = pd.DataFrame(lines).set_index(["sweep", "metric", "layer"])
differences = differences.round(2)
differences

# %% [markdown]
# Each metric at the layer where settings differ the most. Bars are standard deviations over seeds.

# %%
MOST_COLUMNS = 3
n_rows = -(-len(tables) // MOST_COLUMNS)
figure, axes = plt.subplots(
    n_rows,
    min(len(tables), MOST_COLUMNS),
    figsize=(2.3 * min(len(tables), MOST_COLUMNS), 2.3 * n_rows),
    squeeze=False,
    layout="constrained",
)
for axis in axes.flat[len(tables) :]:
    axis.set_axis_off()
for axis, ((sweep, title), ours) in zip(axes.flat, tables.items(), strict=False):
    layer = ours["mean"].std().idxmax()
    # The first setting goes across; each combination of the others is a curve
    across, *others = ours.index.names
    curves = list(ours.groupby(others, observed=True)) if others else [((), ours)]
    looks = ordered_looks(len(curves))
    for (values, curve), look in zip(curves, looks, strict=True):
        settings = curve.index.get_level_values(across).astype(str)
        # One seed has no standard deviation
        bars = curve["std", layer].fillna(0)
        axis.errorbar(
            settings, curve["mean", layer], bars, capsize=2, label=", ".join(values), **look
        )
    metric, _, images = title.partition(" on ")
    n = int(ours["count", layer].max())
    # A unit other than percent follows the images
    images, _, unit = images.partition(", ")
    name = metric.replace("/", "\n", 1)
    axis.set_title(f"{name}, {layer}\n{sweep}: {images}, {n} seeds", fontsize=7)
    axis.set(xlabel=axis_label(across), ylabel=unit or "%")
    if others and axis is axes.flat[0]:
        # Curves of other panels have the same looks
        axis.legend(title=", ".join(map(axis_label, others)), fontsize=6, title_fontsize=6)
for file in save(figure, figures_folder(), "sweep"):
    print("saved", file)

# %%
# Where settings do not matter, the means of n seeds have a deviation of seeds / sqrt(n)
known = differences.dropna(subset=["seeds"])
expected = known["seeds"] / known["n"] ** 0.5
ratios: Any = (known["settings"] / expected).replace(float("inf"), float("nan")).dropna()
if ratios.empty:
    answer = "With one seed of each setting it can't be told: train several."
else:
    most: Any = ratios.idxmax()
    answer = (
        f"**Settings differ by {ratios.median():.1f} times what seeds alone would make them differ "
        f"by, at the median of {len(ratios)} metrics and layers**, and by {ratios.max():.1f} times "
        f"at the most ({most[1]}, {most[2]}, of {most[0]})."
    )
print(answer)
