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
# jupytext, or run `python analysis/sweep.py`, which saves `sweep.png` in the runs folder.

# %%
import matplotlib.pyplot as plt
import pandas as pd
from load import runs_folder

from relloc.reports.sweep import mean_tables, our_lines, read_sweep
from relloc.results import RESULTS_FILE
from relloc.sweeps.sweep import SWEEP_FILE, Sweep

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
figure, axes = plt.subplots(
    1, len(tables), figsize=(4.6 * len(tables), 3.8), squeeze=False, layout="constrained"
)
for axis, ((sweep, title), ours) in zip(axes[0], tables.items(), strict=True):
    layer = ours["mean"].std().idxmax()
    # The first setting goes across; each combination of the others is a curve
    across, *others = ours.index.names
    curves = ours.groupby(others, observed=True) if others else [((), ours)]
    for values, curve in curves:
        settings = curve.index.get_level_values(across).astype(str)
        means = curve["mean", layer]
        # One seed has no standard deviation
        bars = curve["std", layer].fillna(0)
        axis.errorbar(
            settings,
            means,
            bars,
            marker="o",
            label=", ".join(values),
        )
    axis.set(title=f"{sweep}: {title}\n{layer}", xlabel=across)
    axis.grid(alpha=0.3)
    if others:
        axis.legend(title=", ".join(others), fontsize=8)
figure.savefig(runs_folder() / "sweep.png", dpi=120)
print("saved", runs_folder() / "sweep.png")
