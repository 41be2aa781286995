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
# # Which shortcuts does a network use?
#
# The effects that `python -m relloc.study study=shortcuts` measures: what a network answers by
# (points of pretext accuracy) and what positions its features hold (percent explained), of
# pretrained and random weights. 0 is a network that does not use the shortcut. Bars are 95 %
# intervals: over source images of one training, or over several trainings with other seeds.

# %% [markdown]
# `RELLOC_RUNS` names the folder of runs, or `RELLOC_MLFLOW` a store in its place, and
# `RELLOC_SELECT` chooses among them, such as `sweep=gaps eval=knn grid.gap_px=0,21`. Open this in
# Jupyter through jupytext, or run it by Python:
#
#     python analysis/shortcuts.py
#
# saves the figure in `figures` in the folder of runs, as PNG, SVG and PDF.

# %%
import matplotlib.pyplot as plt
import numpy as np
from draw import legend_below, named_lines
from load import LINE, figures_folder, half_widths, load_results, over_seeds, panels

from relloc.errors import DataError
from relloc.figures.style import TWO_COLUMNS, save, use_style
from relloc.geometry import CHANCE_PERCENT

use_style()
rows_of_study = load_results().loc[lambda rows: rows["eval"].eq("shortcuts")]
results = rows_of_study.loc[rows_of_study["metric"].str.startswith("effect_")]
photographs = rows_of_study.loc[rows_of_study["metric"].eq("top1_photographs")]
if results.empty:
    raise DataError(
        "no shortcuts are selected: run python -m relloc.study study=shortcuts "
        "checkpoint=RUN_FOLDER, or change RELLOC_SELECT"
    )
# Each network has a layer of its own at which it holds the most, and a title that says so
results = results.assign(layer="", variant="")
# One study: what its rows share beside their metric, image counts and units decides if they mix
# Effects are of photographs, patches and noise, which no other field of a row decides
same = {"metric": "", "unit": "", "n": 0, "dataset": "", "images": "", "split": "", "view": ""}
shown = panels(results.assign(**same), most=1)
# Networks answer under batch norm as trained, whatever that of features is: one line for both
is_answer = results["unit"].eq("points")
batch_norms = results.loc[~is_answer, "batch_norm"].unique()
if len(batch_norms) == 1:
    results = results.assign(batch_norm=batch_norms[0])
    photographs = photographs.assign(batch_norm=batch_norms[0])
names, looks = named_lines(results)
means = over_seeds(results, [*LINE, "metric", "unit"]).reset_index(["metric", "unit"])
means["line"] = [names[key] for key in means.index]
shortcuts = list(dict.fromkeys(results["metric"]))
means["shortcut"] = means["metric"].str.removeprefix("effect_")

# %% [markdown]
# Effects, in points or percent:

# %%
means.pivot_table(index=["unit", "shortcut"], columns="line", values="mean").round(1)

# %%
PANELS = {"points": "answers: accuracy by the shortcut", "%": "features: position explained"}
units = [unit for unit in PANELS if (means["unit"] == unit).any()]
rows = {unit: list(dict.fromkeys(means.loc[means["unit"] == unit, "shortcut"])) for unit in units}
most = max(map(len, rows.values()))
figure, axes = plt.subplots(
    1, len(units), figsize=(TWO_COLUMNS, 0.8 + 0.32 * most), squeeze=False, layout="constrained"
)
for axis, unit in zip(axes[0], units, strict=True):
    for number, (key, name) in enumerate(names.items()):
        of_line = means[(means["line"] == name) & (means["unit"] == unit)]
        # Lines stand below each other within the row of a shortcut
        shift = (number - (len(names) - 1) / 2) * 0.7 / len(names)
        heights = [-rows[unit].index(shortcut) - shift for shortcut in of_line["shortcut"]]
        bars = np.abs(of_line[["low", "high"]].to_numpy(float).T - of_line["mean"].to_numpy())
        look = {name: value for name, value in looks[key].items() if name != "linestyle"}
        axis.errorbar(
            of_line["mean"], heights, xerr=bars, linestyle="", capsize=2, label=name, **look
        )
    axis.axvline(0, color="0.3", linewidth=0.8)
    axis.set_yticks([-row for row in range(len(rows[unit]))], rows[unit])
    axis.set(title=PANELS[unit], xlabel=f"effect ({unit})")
counts = f"{results['n'].min():,} to {results['n'].max():,} images"
figure.suptitle(f"{results['dataset'].iloc[0]} {results['split'].iloc[0]}, {counts}", fontsize=8)
legend_below(figure, list(axes[0]))
for file in save(figure, figures_folder(), "shortcuts"):
    print("saved", file)

# %% [markdown]
# A shortcut counts as used if its interval, widened for the number of shortcuts, lies above 0, and
# if the network is better than guessing on photographs: what it does otherwise solves no task.

# %%
# Widened by Bonferroni's rule, all intervals hold together in 95 %
is_used = means["mean"] - half_widths(means, of=len(shortcuts)) > 0
better_than_guessing = set()
if len(photographs):
    accuracies = over_seeds(photographs, list(LINE))
    better_than_guessing = set(accuracies.index[accuracies["low"] > CHANCE_PERCENT])
is_better = np.array([key in better_than_guessing for key in means.index])
is_used &= means["unit"].ne("points") | is_better
is_ours = means.index.get_level_values("weights") == "pretrained"
phrases = []
for name in names.values():
    of_line = means[(means["line"] == name) & is_used]
    listed = ", ".join(of_line["shortcut"]) or "none"
    phrases.append(f"{name}: {len(of_line)} ({listed})")
answers = means[(means["unit"] == "points") & is_ours]
largest = answers.iloc[answers["mean"].to_numpy().argmax()] if len(answers) else None
answer = f"**Of {len(shortcuts)} shortcuts these are used or held: {'; '.join(phrases)}.**"
if largest is not None:
    answer += (
        f" The largest effect on pretrained networks' answers is that of {largest['shortcut']}, "
        f"{largest['mean']:+.1f} points ({largest['low']:+.1f} to {largest['high']:+.1f})."
    )
print(answer)
