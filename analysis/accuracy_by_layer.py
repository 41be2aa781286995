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
# Top-1 of frozen features, layer by layer: pretrained on relative location, beside the same network at
# random initialization. Each panel is one evaluation on one data set; dashed lines have batch-norm
# statistics re-estimated on the evaluation's training images.
#
# It reads every run below `RELLOC_RUNS` (or `runs/`). Open it in Jupyter through jupytext, or run
# `python analysis/accuracy_by_layer.py`, which saves `accuracy_by_layer.png` in the runs folder.

# %%
import matplotlib.pyplot as plt
from load import load_results, runs_folder

results = load_results(runs_folder())
results = results[(results["eval"] == "linear") | (results["metric"] == "top1_k20")]

# %% [markdown]
# The mean over runs and seeds of each line, and how many runs are behind it:

# %%
lines = ["dataset", "model", "eval", "batch_norm", "weights"]
by_layer = results.pivot_table(index=lines, columns="layer", values="value", aggfunc="mean").round(1)
by_layer["runs"] = results.groupby(lines)["folder"].nunique()
by_layer


# %%
COLORS = {"pretrained": "tab:blue", "random": "tab:gray", "torchvision": "tab:green"}


def draw_line(axis, rows, weights, batch_norm):
    stages = rows[rows["layer"] != "avgpool"].groupby("layer")["value"].agg(["mean", "min", "max"])
    style = "--" if batch_norm == "recalibrated" else "-"
    label = weights + (", recalibrated" if batch_norm == "recalibrated" else "")
    axis.plot(stages.index, stages["mean"], style, marker="o", color=COLORS[weights], label=label)
    axis.fill_between(stages.index, stages["min"], stages["max"], color=COLORS[weights], alpha=0.15, linewidth=0)


panels = list(results.groupby(["dataset", "model", "eval"]))
figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.8), squeeze=False, layout="constrained")
for axis, ((dataset, model, evaluation), rows) in zip(axes[0], panels, strict=True):
    for (weights, batch_norm), line in rows.groupby(["weights", "batch_norm"]):
        draw_line(axis, line, weights, batch_norm)
    axis.set_title(f"{evaluation} on {dataset}, {model}", fontsize=10)
    axis.set_ylabel("top-1 (%)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
figure.savefig(runs_folder() / "accuracy_by_layer.png", dpi=120)
