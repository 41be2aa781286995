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
# `python -m relloc.report sweep=NAME` has all means of a sweep. Here each metric and layer of each sweep, of gap and
# jitter for example, has two numbers: how far its settings lie apart, and how far seeds do.
#
# It reads every sweep below `RELLOC_RUNS` (or `runs/`). Open it in Jupyter through jupytext, or run
# `python analysis/sweep.py`, which saves `sweep.png` in the runs folder.

# %%
import matplotlib.pyplot as plt
import pandas as pd
from load import runs_folder

from relloc.reports.sweep import mean_tables, our_lines, read_sweep
from relloc.results import RESULTS_FILE
from relloc.sweeps.sweep import SWEEP_FILE, Sweep

tables = {}
for file in sorted(runs_folder().glob(f"sweeps/*/{SWEEP_FILE}")):
    points = [
        point for point in Sweep(file.parent).points() if (point.folder / RESULTS_FILE).exists()
    ]
    if points:
        numbers = read_sweep(file.parent.name, points, ["" for _ in points])
        tables |= {
            (numbers.name, title): our_lines(numbers, table)
            for title, table in mean_tables(numbers)
        }
if not tables:
    raise FileNotFoundError(
        f"no sweep with results below {runs_folder().resolve()}: run one, or set RELLOC_RUNS"
    )

# %% [markdown]
# `settings` is the standard deviation of the means, `seeds` that of seeds within a setting (pooled; none where there is
# one seed). Of settings that do not matter, means of n seeds would lie `seeds` / √n apart.

# %%
lines = [
    {"sweep": sweep, "metric": title, "layer": layer}
    | {"settings": ours["mean", layer].std(), "seeds": (ours["std", layer] ** 2).mean() ** 0.5}
    | {"n": ours["count", layer].mean(), "highest": ours["mean", layer].idxmax()}
    for (sweep, title), ours in tables.items()
    for layer in ours["mean"].columns
]
apart = pd.DataFrame(lines).set_index(["sweep", "metric", "layer"]).round(2)
apart

# %% [markdown]
# Each metric at the layer at which settings lie apart the most; bars are standard deviations over seeds.

# %%
figure, axes = plt.subplots(
    1, len(tables), figsize=(4.6 * len(tables), 3.8), squeeze=False, layout="constrained"
)
for axis, ((sweep, title), ours) in zip(axes[0], tables.items(), strict=True):
    layer = ours["mean"].std().idxmax()
    across, *others = ours.index.names
    for values, line in ours.groupby(others, observed=True) if others else [((), ours)]:
        places = line.index.get_level_values(across).astype(str)
        axis.errorbar(
            places,
            line["mean", layer],
            line["std", layer].fillna(0),
            marker="o",
            label=", ".join(values),
        )
    axis.set(title=f"{sweep}: {title}\n{layer}", xlabel=across)
    axis.grid(alpha=0.3)
    if others:
        axis.legend(title=", ".join(others), fontsize=8)
figure.savefig(runs_folder() / "sweep.png", dpi=120)
print("saved", runs_folder() / "sweep.png")
