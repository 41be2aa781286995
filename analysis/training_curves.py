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
# # How did pretraining go?
#
# Each pretraining's pretext loss, its accuracy on training and held-out images, and the RankMe
# (effective rank) of its features, by step.
#
# The notebook reads the journals of every run below `RELLOC_RUNS` (or `runs/`). Open it in Jupyter
# through jupytext, or run `python analysis/training_curves.py`, which saves `training_curves.png`
# in the runs folder.

# %%
import matplotlib.pyplot as plt
from load import load_curves, runs_folder

curves = load_curves(runs_folder())
# The metrics of each panel, by its title
PANELS = {
    "pretext loss": ["train/loss"],
    "pretext top-1, %": ["train/top1", "monitor/pretext/top1"],
    "RankMe": ["monitor/rankme/feature4", "monitor/rankme/feature5", "monitor/rankme/avgpool"],
}

# %% [markdown]
# The last values of each run:

# %%
curves.groupby(["run", "metric"], sort=False)["value"].last().unstack("run").round(2)

# %%
figure, axes = plt.subplots(
    1, len(PANELS), figsize=(4.6 * len(PANELS), 3.6), squeeze=False, layout="constrained"
)
for axis, (title, metrics) in zip(axes[0], PANELS.items(), strict=True):
    shown = curves.loc[curves["metric"].isin(metrics)]
    for (run, metric), curve in shown.groupby(["run", "metric"], sort=False):
        axis.plot(curve["step"], curve["value"], linewidth=1.2, label=f"{run}, {metric}")
    axis.set(title=title, xlabel="step")
    axis.grid(alpha=0.3)
    # A pretraining without monitors has empty panels
    if axis.lines:
        axis.legend(fontsize=7)
figure.savefig(runs_folder() / "training_curves.png", dpi=120)
print("saved", runs_folder() / "training_curves.png")
