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
# # Can a run be chosen without labels?
#
# Measures of features that need no labels (RankMe, stable rank, alpha-ReQ, LiDAR, DSE) and held-out
# pretext accuracy, each against each accuracy that was measured of the same runs. If a measure
# ranked runs as an accuracy does, labels would not be needed to choose among them.
#
# It uses what at least five settings have in common.

# %% [markdown]
# `RELLOC_RUNS` names the folder of runs, or `RELLOC_MLFLOW` a store in its place, and
# `RELLOC_SELECT` chooses among them, such as `sweep=gaps eval=knn grid.gap_px=0,21`. Open this in
# Jupyter through jupytext, or run it by Python:
#
#     python analysis/label_free.py
#
# saves the figures in `figures` in the folder of runs, as PNG, SVG and PDF.

# %%
import matplotlib.pyplot as plt
import pandas as pd
from load import figures_folder, load_measured, selected_words

from relloc.figures.style import category_looks, save, use_style
from relloc.reports.observations import observations
from relloc.reports.prediction import check_enough, predictions

use_style()
observed = observations(load_measured())
check_enough(observed, " ".join(selected_words()) or "all runs")
found = predictions(observed)

# %% [markdown]
# Spearman's rank correlation, with its 95 % interval from a bootstrap over settings (seeds of one
# setting stay together):

# %%
lines = []
for each in found:
    accuracy = each.accuracy
    spearman = each.spearman
    # Of too few settings, or where all runs have one value, there is no correlation
    if spearman is None:
        continue
    words = (f"{accuracy.eval}/{accuracy.metric}", accuracy.decoder)
    line = {
        "accuracy": ", ".join(filter(None, words)),
        "images": f"{accuracy.dataset} {accuracy.split}",
        "model": accuracy.model,
        "batch norm": accuracy.batch_norm,
        "measure": each.measure.name,
        "n": each.measure.n,
        "layer": each.layer or "network",
        "runs": each.n_weights,
        "settings": each.n_points,
        "rho": spearman.value,
        "low": spearman.low,
        "high": spearman.high,
    }
    lines.append(line)
table = pd.DataFrame(lines)
keys = ["accuracy", "images", "model", "batch norm", "measure", "n", "layer"]
table.set_index(keys).round(2)

# %% [markdown]
# One point a run. Each row is an accuracy and each column a measure, at the layer where that
# accuracy is highest on average over the runs, for all measures alike.


# %%
def best_layer(accuracy):
    """Returns the layer at which an evaluation has its highest mean, "" if it has no layers."""
    means = {}
    for quantity, values in observed.accuracies.items():
        if quantity.without_layer == accuracy.without_layer:
            means[quantity.layer] = sum(values.values()) / len(values)
    return max(means, key=lambda layer: means[layer])


# Fine-tuned networks have no layer, and are held against each layer: the last stage is shown
SHOWN_OF_NETWORKS = "feature5"
panels = {}
for each in found:
    layer = best_layer(each.accuracy) or SHOWN_OF_NETWORKS
    if each.spearman and each.layer in ("", layer):
        row, column = each.accuracy.without_layer, each.measure.without_layer
        panels[row, column] = each
rows = list(dict.fromkeys(row for row, _ in panels))
columns = list(dict.fromkeys(column for _, column in panels))
figure, axes = plt.subplots(
    len(rows),
    len(columns),
    figsize=(1.75 * len(columns), 1.75 * len(rows)),
    squeeze=False,
    layout="constrained",
)
for (row, column), each in panels.items():
    axis = axes[rows.index(row), columns.index(column)]
    of_measure = observed.measures[each.measure]
    of_accuracy = observed.accuracies[each.accuracy]
    weights = sorted(of_measure.keys() & of_accuracy.keys())
    [look] = category_looks(1)
    axis.scatter(
        [of_measure[name] for name in weights],
        [of_accuracy[name] for name in weights],
        s=12,
        color=look["color"],
    )
    axis.set_title(f"rho {each.spearman.value:.2f} at {each.layer or 'network'}", fontsize=7)
    unit = "pairs" if column.kind == "pretext" else "images"
    axis.set_xlabel(f"{column.name}\n({column.n:,} {unit})", fontsize=7)
    axis.set_ylabel(f"{row.eval}/{row.metric} (%)\nn = {row.n:,}", fontsize=7)
for axis in axes.flat:
    # Not each measure was taken of each model and batch norm
    if not axis.collections:
        axis.set_axis_off()
for file in save(figure, figures_folder(), "label_free"):
    print("saved", file)

# %% [markdown]
# A measure ranks runs by an accuracy beyond what seeds and the choice of settings explain if its
# interval leaves out 0. With as many intervals as here, one in twenty would do so by chance. A
# measure is of use only if its sign is the same wherever that is so.

# %%
decided = table.loc[(table["low"] > 0) | (table["high"] < 0)]
signs = decided.groupby("measure")["rho"].agg(
    positive=lambda rho: int((rho > 0).sum()), negative=lambda rho: int((rho < 0).sum())
)
# Each layer and accuracy counts once
totals = table.groupby("measure")["rho"].agg(total="count", median="median")
signs = totals.join(signs).fillna(0)
signs["share"] = signs[["positive", "negative"]].max(axis=1) / signs["total"]
is_one_way = signs[["positive", "negative"]].min(axis=1) == 0
is_steady = is_one_way & (signs["share"] > 0)
steady = signs.loc[is_steady]
if steady.empty:
    answer = (
        f"**No: none of {len(signs)} measures goes with accuracy in one direction** over "
        f"{observed.n_points} settings."
    )
else:
    name = steady["share"].idxmax()
    best = steady.loc[name]
    n_decided = int(max(best["positive"], best["negative"]))
    direction = "higher" if best["positive"] else "lower"
    # Chance alone would leave about one of twenty intervals beside 0
    verdict = "Partly" if best["share"] > 0.5 else "Hardly"
    answer = (
        f"**{verdict}: {name} is the steadiest of {len(signs)} measures: {direction} "
        f"values go with higher accuracy** in {n_decided} of {int(best['total'])} pairs of "
        f"accuracy and layer (median rho {best['median']:.2f}), and in none the other way round, "
        f"over {observed.n_points} settings."
    )
print(answer)
