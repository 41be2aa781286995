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
# # At which layer does pretraining pay?
#
# The headline metric of each evaluation, layer by layer: networks pretrained on relative location,
# beside the same network at random initialization and supervised weights, and beside the published
# numbers where images and protocol are those of the card. Each panel is one evaluation on one set
# of images. Hollow markers have batch-norm statistics re-estimated on the evaluation's training
# images. Bands go from the lowest to the highest of several seeds.

# %% [markdown]
# `RELLOC_RUNS` names the folder of runs, or `RELLOC_MLFLOW` a store in its place, and
# `RELLOC_SELECT` chooses among them, such as `sweep=gaps eval=knn grid.gap_px=0,21`. Open this in
# Jupyter through jupytext, or run it by Python:
#
#     python analysis/accuracy_by_layer.py
#
# saves the figure in `figures` in the folder of runs, as PNG, SVG and PDF.

# %%
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

from relloc.figures.style import save, use_style
from relloc.reports.published import CARD, RANDOM, SUPERVISED, published_numbers
from relloc.results import LAYERS

use_style()
STAGES = list(LAYERS[:5])
results = load_results()
# The pooled output is no stage, but a view of the last
is_of_stage = results["layer"].isin(STAGES) & results["kind"].eq("frozen")
is_accuracy = results["unit"].eq("%") & results["higher_is_better"].eq(True)
is_number = results["headline"] & results["spread"].eq("")
results = results.loc[is_of_stage & is_accuracy & is_number]
shown = panels(results)
names, looks = named_lines(results)

# %% [markdown]
# Means over seeds, and of how many:

# %%
lines = []
for shared, rows in shown:
    means = over_seeds(rows, [*LINE, "layer"]).reset_index("layer")
    for key in names:
        if key not in means.index:
            continue
        of_line = means.loc[[key]].set_index("layer").sort_index()
        line = {"evaluation": shared["eval"], "images": f"{shared['dataset']} {shared['split']}"}
        line |= {"line": names[key], "seeds": int(of_line["n"].max())}
        lines.append(line | of_line["mean"].round(1).to_dict())
table = as_frame(lines).set_index(["evaluation", "images", "line"])
table

# %%
# The published rows, and how they are drawn: unconnected, as they are of another training
PUBLISHED = {CARD: ("published", "k*"), SUPERVISED: ("published, supervised", "k+")}
PUBLISHED[RANDOM] = ("published, random", "kx")


def draw_published(axis, evaluation):
    """Draws the published numbers of an evaluation at their layers, with their tolerances."""
    for row, (label, look) in PUBLISHED.items():
        for number in published_numbers():
            is_of_panel = number.row == row and number.evaluation == evaluation
            if is_of_panel and number.column in STAGES:
                axis.errorbar(
                    STAGES.index(number.column),
                    number.value,
                    number.tolerance,
                    fmt=look,
                    markersize=6,
                    label=label,
                )


figure, axes = panel_axes(len(shown))
for axis, (shared, rows) in zip(axes, shown, strict=True):
    means = over_seeds(rows, [*LINE, "layer"]).reset_index("layer")
    for key, name in names.items():
        if key not in means.index:
            continue
        of_line = means.loc[[key]].sort_values("layer")
        x = [STAGES.index(layer) for layer in of_line["layer"]]
        seeds = int(of_line["n"].max())
        draw_line(axis, x, of_line, f"{name} ({seeds} seeds)" if seeds > 1 else name, looks[key])
    if is_of_card(shared):
        draw_published(axis, shared["eval"])
    axis.set_xticks(range(5), [f"{number}" for number in range(1, 6)])
    axis.set(title=panel_title(shared, results), xlabel="layer (feature1 to feature5)")
    axis.set_ylabel(f"{shared['metric']} (%)")
legend_below(figure, axes)
for file in save(figure, figures_folder(), "accuracy_by_layer"):
    print("saved", file)

# %% [markdown]
# How much more accurate pretrained weights are than random ones of the same model, batch norm and
# images, in points:

# %%
# Of each panel and batch norm: gains by line and layer, and how many seeds they are of
gains = []
for shared, rows in shown:
    means = over_seeds(rows, [*LINE, "layer"])["mean"].unstack("layer")
    is_random = means.index.get_level_values("weights") == "random"
    controls = means[is_random].droplevel(list(LINE[:-1]))
    for key, of_line in means[~is_random].iterrows():
        if key[0] == "pretrained" and key[-1] in controls.index:
            gain = of_line - controls.loc[key[-1]]
            gains.append({"eval": shared["eval"], "line": names[key]} | gain.dropna().to_dict())
if not gains:
    answer = (
        "Random weights were not measured beside pretrained ones: evaluate 'checkpoint=random'."
    )
else:
    gains = as_frame(gains).set_index(["eval", "line"])
    mean_gains = gains.mean()
    best = mean_gains.idxmax()
    n_better = int((gains > 0).sum().sum())
    evaluation, line = gains[best].idxmax()
    answer = (
        f"**Pretraining pays most at {best}: {mean_gains[best]:+.1f} points over random weights on "
        f"average over {len(gains)} lines of {len(shown)} panels** (at most "
        f"{gains[best].max():+.1f}, {evaluation} of {line}; least at {mean_gains.idxmin()}, "
        f"{mean_gains.min():+.1f}); it is better in {n_better} of {int(gains.count().sum())} cells."
    )
print(answer)
