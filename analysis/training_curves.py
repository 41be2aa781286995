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
# # How did pretraining go, and did it still improve at its end?
#
# Pretext loss, accuracy on training and held-out images, the RankMe (effective rank) of features
# and nearest neighbors on labeled images, over the images seen; and what
# `python -m relloc.evaluate watch=` measured meanwhile. Trainings that differ in their seed
# alone are one line, their mean, with the range from the lowest to the highest.

# %% [markdown]
# `RELLOC_RUNS` names the folder of runs, or `RELLOC_MLFLOW` a store in its place, and
# `RELLOC_SELECT` chooses among them, such as `sweep=gaps eval=knn grid.gap_px=0,21`. Open this in
# Jupyter through jupytext, or run it by Python:
#
#     python analysis/training_curves.py
#
# saves the figure in `figures` in the folder of runs, as PNG, SVG and PDF.

# %%
from typing import Any

import numpy as np
import pandas as pd
from draw import legend_below, named_lines, panel_axes
from load import LINE, as_frame, figures_folder, load_curves

from relloc.figures.style import mark_chance, save, use_style

use_style()
curves = load_curves()
names, looks = named_lines(curves)
measured = curves["metric"].unique()
CHANCE = 12.5  # percent, of the eight positions around the center
neighbors = [name for name in measured if name.startswith("monitor/knn/feature4/")]
PANELS = {
    "train/loss": "pretext loss (nats)",
    "train/top1": "pretext top-1,\ntraining images (%)",
    "monitor/pretext/top1": "pretext top-1,\nheld-out images (%)",
    "monitor/rankme/feature4": "RankMe, feature4\n(directions)",
    "monitor/rankme/feature5": "RankMe, feature5\n(directions)",
}
for name in neighbors[:1]:
    PANELS[name] = "nearest neighbors,\nfeature4, top-1 (%)"
# Of evaluations that were watched the accuracy, that of nearest neighbors with 20 of them
for name in sorted(measured):
    if name.startswith("watch/") and name.endswith(("/feature4/top1", "/feature4/top1_k20")):
        evaluation = name.split("/")[1].replace("_recalibrated", ", recalibrated")
        PANELS[name] = f"{evaluation},\nfeature4, top-1 (%)"
metrics = [metric for metric in PANELS if metric in measured]
# Older runs did not record how many images a step has
x_axis = "images_seen" if curves["images_seen"].notna().all() else "step"
X_LABELS = {"images_seen": "images seen (thousands)", "step": "step"}
scale = 1000 if x_axis == "images_seen" else 1  # from millions

# %% [markdown]
# The last values of each line, means over seeds:

# %%
last = curves.groupby([*LINE, "folder", "metric"], sort=False)["value"].last()
by_line = last.groupby([*LINE, "metric"], sort=False).agg(["mean", "count"])
table = by_line["mean"].unstack("metric")[metrics].round(2)
table.insert(0, "seeds", by_line["count"].unstack("metric").max(axis=1).astype(int))
table.index = pd.Index([names[key] for key in table.index], name="line")
table

# %%
figure, axes = panel_axes(len(metrics), height=1.9)
for axis, metric in zip(axes, metrics, strict=True):
    of_metric = curves[curves["metric"] == metric]
    for key, name in names.items():
        is_of_line = np.ones(len(of_metric), dtype=bool)
        for field, value in zip(LINE, key, strict=True):
            is_of_line &= (of_metric[field] == value).to_numpy()
        of_line = of_metric[is_of_line]
        if of_line.empty:
            continue
        n = of_line["folder"].nunique()
        # Steps that all seeds have: one that was resumed may have reported at others
        by_step = of_line.groupby(x_axis)["value"].agg(["mean", "min", "max", "count"])
        by_step = by_step[by_step["count"] == n]
        look: dict[str, Any] = looks[key] | {"markevery": max(1, len(by_step) // 6)}
        x = by_step.index * scale
        axis.plot(x, by_step["mean"], label=f"{name} (n = {n})", **look)
        if n > 1:
            axis.fill_between(
                x, by_step["min"], by_step["max"], color=look["color"], alpha=0.12, linewidth=0
            )
    if "pretext/top1" in metric or metric == "train/top1":
        mark_chance(axis, CHANCE, f"chance of pairs with the center, {CHANCE} %")
    if metric == "train/loss":
        mark_chance(axis, float(np.log(8)), "chance of pairs with the center, log 8")
    axis.set(ylabel=PANELS[metric], xlabel=X_LABELS[x_axis])
legend_below(figure, axes)
for file in save(figure, figures_folder(), "training_curves"):
    print("saved", file)

# %% [markdown]
# Whether a training still improved: its held-out pretext accuracy at the end less that of the last
# time before, at most the last tenth of the images seen, but for short trainings.

# %%
held_out = curves[curves["metric"] == "monitor/pretext/top1"]
ends = []
for folder, of_run in held_out.groupby("folder"):
    values = of_run.sort_values("step")["value"].to_numpy()
    if len(values) > 1:
        before = values[min(len(values) - 2, int(0.9 * len(values)))]
        ends.append({"folder": folder, "last": values[-1], "gain": values[-1] - before})
if not ends:
    loss = curves[curves["metric"] == "train/loss"].groupby("folder")["value"].last()
    answer = f"Held-out accuracy was not watched twice; the last loss is {loss.mean():.2f}."
else:
    ends = as_frame(ends)
    n_better = int((ends["gain"] > 0).sum())
    answer = (
        f"**Held-out pretext accuracy ended at {ends['last'].mean():.1f} % on average over "
        f"{len(ends)} trainings (from {ends['last'].min():.1f} to {ends['last'].max():.1f}; chance "
        f"{CHANCE} %), and {n_better} of them still improved at their end**, by "
        f"{ends['gain'].mean():+.1f} points on average."
    )
print(answer)
