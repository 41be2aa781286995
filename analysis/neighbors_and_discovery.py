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
# # Do nearest patches show the same things, and are they found again in many images?
#
# Of `python -m relloc.study 'study=[neighbors,discovery]'`: the share of nearest patches whose
# image has the class of the query's, layer by layer, less the share by chance; and of visual data
# mining the area under the curve of purity over coverage, less that by chance, the share of
# verified images, and the coverage. Bars are 95 % intervals.

# %% [markdown]
# `RELLOC_RUNS` names the folder of runs, or `RELLOC_MLFLOW` a store in its place, and
# `RELLOC_SELECT` chooses among them, such as `sweep=gaps eval=knn grid.gap_px=0,21`. Open this in
# Jupyter through jupytext, or run it by Python:
#
#     python analysis/neighbors_and_discovery.py
#
# saves the figure in `figures` in the folder of runs, as PNG, SVG and PDF.

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from draw import legend_below, named_lines
from load import LINE, Frame, figures_folder, load_results, over_seeds, panels

from relloc.errors import DataError
from relloc.figures.style import TWO_COLUMNS, save, use_style

use_style()
results = load_results()
results = results.loc[results["eval"].isin(["neighbors", "discovery"])]
if results.empty:
    raise DataError(
        "no neighbors and no discovery are selected: run python -m relloc.study "
        "'study=[neighbors,discovery]' checkpoint=RUN_FOLDER, or change RELLOC_SELECT"
    )
names, looks = named_lines(results)
is_of_class = results["eval"].eq("neighbors") & results["metric"].str.startswith("same_class")
neighbors = results.loc[is_of_class]
discovery = results.loc[results["eval"].eq("discovery")]
# Of each study one kind of images and settings: what is found and chance are measured together
for rows in (neighbors, discovery):
    panels(rows.assign(metric="", variant="", n=0), most=1)


def gains(rows, keys):
    """Returns the values less those by chance, which have the same name and `chance` in it."""
    is_chance = rows["metric"].str.endswith("_chance")
    chance = rows[is_chance].assign(metric=rows["metric"].str.removesuffix("_chance"))
    found = rows[~is_chance].assign(metric=rows["metric"].str.replace(r"_k\d+$", "", regex=True))
    matched = [*LINE, "weights_seed", "seed", "fingerprint", "metric", *keys]
    by_chance = chance.set_index(matched)["value"]
    expected: Frame = by_chance.reindex(found.set_index(matched).index).to_numpy()
    # What has no chance, such as the coverage, is no gain
    found = found.assign(
        value=found["value"] - expected, low=found["low"] - expected, high=found["high"] - expected
    )
    return found.dropna(subset=["value"]).assign(variant="")


# %% [markdown]
# Neighbors of the query's class, and areas under purity over coverage, above chance (points):

# %%
tables = []
of_neighbors = gains(neighbors, ["column"])
of_discovery = gains(discovery, ["column"])
for rows in (of_neighbors, of_discovery):
    if len(rows):
        means = over_seeds(rows, [*LINE, "eval", "metric", "column"]).reset_index()
        means["line"] = [names[key] for key in means[list(LINE)].itertuples(index=False, name=None)]
        tables.append(means)
above: Frame = (
    pd.concat(tables) if tables else pd.DataFrame(columns=["eval", "line", "column", "mean"])
)
above.pivot_table(index=["eval", "column"], columns="line", values="mean", sort=False).round(1)

# %%
plain = discovery.loc[~discovery["metric"].str.endswith("_chance")]
PANELS = {"neighbors": "same class above chance (points)"}
PANELS["discovery"] = "purity-coverage area\nabove chance (points)"
kinds = [kind for kind in PANELS if (above["eval"] == kind).any()]
shares = plain.loc[plain["metric"].isin(["verified_images", "coverage"])]
n_panels = len(kinds) + (1 if len(shares) else 0)
figure, axes = plt.subplots(
    1, n_panels, figsize=(TWO_COLUMNS * n_panels / 3, 2.2), squeeze=False, layout="constrained"
)


def draw_dots(axis, means, label):
    """Draws a dot for each line at each column, beside each other, with its interval."""
    columns = list(dict.fromkeys(means["column"]))
    for number, (key, name) in enumerate(names.items()):
        of_line = means[means["line"] == name]
        shift = (number - (len(names) - 1) / 2) * 0.5 / len(names)
        x = [columns.index(column) + shift for column in of_line["column"]]
        bars = np.abs(of_line[["low", "high"]].to_numpy(float).T - of_line["mean"].to_numpy())
        look = {field: value for field, value in looks[key].items() if field != "linestyle"}
        axis.errorbar(x, of_line["mean"], yerr=bars, linestyle="", capsize=2, label=name, **look)
    axis.set_xticks(range(len(columns)), columns)
    axis.set(ylabel=label, xlim=(-0.5, len(columns) - 0.5))


for axis, kind in zip(axes[0], kinds, strict=False):
    means = above[above["eval"] == kind]
    draw_dots(axis, means, PANELS[kind])
    axis.axhline(0, color="0.6", linewidth=0.8, linestyle=(0, (1, 2)), label="chance")
    first = results[results["eval"] == kind].iloc[0]
    counted = "queries" if kind == "neighbors" else "images"
    axis.set_title(f"{kind}: {first['dataset']} {first['split']}\nn = {first['n']:,} {counted}")
if len(shares):
    means = over_seeds(shares, [*LINE, "metric", "column"]).reset_index()
    means["line"] = [names[key] for key in means[list(LINE)].itertuples(index=False, name=None)]
    draw_dots(axes[0][-1], means, "share of images (%)")
    axes[0][-1].set_title(f"discovery\nn = {shares['n'].iloc[0]:,} images")
legend_below(figure, list(axes[0]))
for file in save(figure, figures_folder(), "neighbors_and_discovery"):
    print("saved", file)

# %%
phrases = []
for kind in kinds:
    means = above[above["eval"] == kind]
    what = "Neighbors share the class" if kind == "neighbors" else "The area is"
    for weights, of_weights in means.groupby("weights"):
        best = of_weights.loc[[of_weights["mean"].idxmax()]].iloc[0]
        phrases.append(
            f"{what} {best['mean']:+.1f} points above chance at most with {weights} weights "
            f"({best['column']})"
        )
if not phrases:
    answer = "Images without classes tell nothing here: look at the contact sheets of the studies."
else:
    answer = f"**{'; '.join(phrases)}.**"
# Line by line, as pretrainings that differ in more than the seed are no repeats
verified = plain.loc[plain["metric"].eq("verified_images")]
if len(verified):
    means = over_seeds(verified, list(LINE))["mean"]
    shares = [f"{names[key]} {share:.1f} %" for key, share in means.items()]
    answer += f" Images that were verified: {', '.join(shares)}."
print(answer)
