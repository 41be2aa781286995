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
# # How much does pretraining help where few images have labels?
#
# Low-shot SVMs: accuracy over the number of labeled images of each class, at each layer, of
# pretrained and random weights, and of the published row where images and model are those of the
# card. Hollow markers have batch-norm statistics re-estimated on the training images. Bars are the
# standard deviation over the draws of labeled images; bands go from the lowest to the highest seed,
# where several were trained.

# %% [markdown]
# `RELLOC_RUNS` names the folder of runs, or `RELLOC_MLFLOW` a store in its place, and
# `RELLOC_SELECT` chooses among them, such as `sweep=gaps eval=knn grid.gap_px=0,21`. Open this in
# Jupyter through jupytext, or run it by Python:
#
#     python analysis/low_shot_curves.py
#
# saves the figure in `figures` in the folder of runs, as PNG, SVG and PDF.

# %%
import pandas as pd
from draw import draw_line, legend_below, named_lines, panel_axes
from load import (
    LINE,
    as_frame,
    figures_folder,
    is_of_card,
    load_results,
    over_seeds,
    panel_title,
    panels,
)

from relloc.errors import DataError
from relloc.figures.style import save, use_style
from relloc.reports.published import CARD, published_numbers

use_style()
results = load_results()
is_accuracy = results["unit"].eq("%") & results["higher_is_better"].eq(True)
# Nearest neighbors have a k as well, which is no number of labels
is_low_shot = results["k"].notna() & results["eval"].str.contains("low_shot")
# As published, the cost of the SVM is chosen on the test images
is_published_choice = results["variant"].eq("")
is_spread = results["spread"].ne("")
results = results.loc[is_accuracy & is_low_shot & (is_published_choice | is_spread)]
if results.empty:
    raise DataError(
        "no low-shot results are selected: run python -m relloc.evaluate checkpoint=RUN_FOLDER "
        "eval=voc07_low_shot, or change RELLOC_SELECT"
    )
is_draws = results["spread"].eq("std")
# Over draws, `std` has a row of its own, which belongs to the number of the same layer and k
deviations = results.loc[is_draws].set_index([*LINE, "eval", "seed", "layer", "k"])["value"]
results = results.loc[results["spread"].eq("")]
# The metric is called map_k1, map_k2, …: one panel has them all
results = results.assign(metric=results["series"])
shown = panels(results, most=2)
names, looks = named_lines(results)
layers = [layer for layer in results["layer"].cat.categories if (results["layer"] == layer).any()]

# %% [markdown]
# Means over draws and seeds:

# %%
means_of = []
for _, rows in shown:
    means_of.append(over_seeds(rows, [*LINE, "layer", "k"]))
tables = []
for (shared, _), means in zip(shown, means_of, strict=True):
    table = means["mean"].unstack("k").round(1).reset_index()
    keys = table[list(LINE)].itertuples(index=False, name=None)
    table.insert(0, "line", [names[key] for key in keys])
    tables.append(table.drop(columns=list(LINE)).assign(evaluation=shared["eval"]))
pd.concat(tables).set_index(["evaluation", "line", "layer"])

# %%
figure, axes = panel_axes(len(shown) * len(layers), height=2.1)
panel_of = iter(axes)
for (shared, rows), means in zip(shown, means_of, strict=True):
    for layer in layers:
        axis = next(panel_of)
        for key, name in names.items():
            of_line = means.reset_index(["layer", "k"])
            of_line = of_line[[own == key for own in of_line.index]]
            of_line = of_line[of_line["layer"] == layer].sort_values("k")
            if of_line.empty:
                continue
            draw_line(axis, of_line["k"], of_line, name, looks[key])
            if (of_line["n"] == 1).all():
                # One training: what is known to vary is the draw of labeled images
                found = rows[(rows["layer"] == layer) & (rows["study"] == key[1])]
                found = found[found["batch_norm"] == key[-1]].sort_values("k")
                where = found.set_index([*LINE, "eval", "seed", "layer", "k"]).index
                bars = deviations.reindex(where).to_numpy()
                color = looks[key]["color"]
                axis.errorbar(found["k"], found["value"], bars, fmt="none", color=color, capsize=2)
        if is_of_card(shared):
            for number in published_numbers():
                if number.row == CARD and number.evaluation == shared["eval"]:
                    k = int(number.column.removeprefix("k="))
                    is_first = number.column == "k=1"
                    label = f"published ({number.layer})" if is_first else "_"
                    axis.errorbar(k, number.value, number.tolerance, fmt="k*", label=label)
        axis.set_xscale("log", base=2)
        ticks = sorted(rows["k"].unique())
        axis.set_xticks(ticks, [f"{k:g}" for k in ticks])
        axis.minorticks_off()
        axis.set(title=f"{panel_title(shared, results)}, {layer}", ylabel=f"{shared['metric']} (%)")
        axis.set_xlabel("labeled images of a class")
legend_below(figure, axes)
for file in save(figure, figures_folder(), "low_shot_curves"):
    print("saved", file)

# %% [markdown]
# The gain of pretrained over random weights of the same batch norm, in points, at each number of
# labels, averaged over layers and lines:

# %%
gains = []
for means in means_of:
    values = means["mean"].unstack("k")
    is_random = values.index.get_level_values("weights") == "random"
    controls = values[is_random].droplevel(list(LINE[:-1]))
    for key, of_line in values[~is_random].iterrows():
        if key[0] == "pretrained" and key[-2:] in controls.index:
            gains.append(of_line - controls.loc[key[-2:]])
if not gains:
    answer = (
        "Random weights were not measured beside pretrained ones: evaluate 'checkpoint=random'."
    )
else:
    gains = as_frame(gains)
    mean = gains.mean()
    fewest, most = mean.index.min(), mean.index.max()
    answer = (
        f"**With {fewest:g} labeled image of a class pretraining gains {mean[fewest]:+.1f} points "
        f"over random weights, with {most:g} it gains {mean[most]:+.1f}**, on average over "
        f"{len(gains)} lines and layers (most at k = {mean.idxmax():g}, {mean.max():+.1f}); it is "
        f"better in {int((gains > 0).sum().sum())} of {int(gains.count().sum())} cells."
    )
print(answer)
