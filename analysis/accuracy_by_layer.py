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
# The headline metric of each evaluation, layer by layer: pretrained on relative location, beside
# the same network at random initialization. Each panel is one evaluation on one data set. Dashed
# lines have batch-norm statistics re-estimated on the evaluation's training images.
#
# The notebook reads every run below `RELLOC_RUNS` (or `runs/`). Open it in Jupyter through
# jupytext, or run `python analysis/accuracy_by_layer.py`, which saves `accuracy_by_layer.png` in
# the runs folder.

# %%
import matplotlib.pyplot as plt
from load import load_results, runs_folder

results = load_results(runs_folder())
is_percent = results["unit"] == "%"
has_layer = results["layer"] != ""
results = results.loc[results["headline"] & is_percent & has_layer]

# %% [markdown]
# Runs that differ in their seed alone are one line, a study (`gap21 jit0..21 6ep photos small
# gray`). The table has its mean, and how many runs are behind it:

# %%
line_keys = ["study", "settings", "weights", "batch_norm"]
lines = ["dataset", "model", "eval", *line_keys]
means = results.pivot_table(index=lines, columns="layer", values="value", aggfunc="mean")
by_layer = means.round(1)
by_layer["runs"] = results.groupby(lines)["folder"].nunique()
by_layer


# %%
def draw_line(axis, rows, label, color, batch_norm):
    """Draws the mean of a study over the stages, with the range from its worst to its best run."""
    # The pooled output is no stage, but a view of the last
    rows = rows[rows["layer"] != "avgpool"]
    stages = rows.groupby("layer")["value"].agg(["mean", "min", "max"])
    style = "--" if batch_norm == "recalibrated" else "-"
    names = stages.index
    axis.plot(names, stages["mean"], style, marker="o", color=color, label=label)
    axis.fill_between(
        names,
        stages["min"],
        stages["max"],
        color=color,
        alpha=0.15,
        linewidth=0,
    )


panels = list(results.groupby(["dataset", "model", "eval"]))
figure, axes = plt.subplots(
    1, len(panels), figsize=(4.6 * len(panels), 3.8), squeeze=False, layout="constrained"
)
for axis, ((dataset, model, evaluation), rows) in zip(axes[0], panels, strict=True):
    pretrained = rows[rows["weights"] != "random"]
    # A study has one color, with batch norm as trained and recalibrated
    named = zip(pretrained["study"], pretrained["settings"], strict=True)
    studies = list(dict.fromkeys(named))
    for (study, settings, weights, batch_norm), line in rows.groupby(line_keys, sort=False):
        if weights == "random":
            color = "gray"
        else:
            number = studies.index((study, settings))
            color = f"C{number}"
        name = study
        if batch_norm == "recalibrated":
            name += ", recalibrated"
        draw_line(axis, line, name, color, batch_norm)
    axis.set_title(f"{evaluation} on {dataset}, {model}", fontsize=10)
    axis.set_ylabel(f"{rows['metric'].iloc[0]} (%)")
    axis.grid(alpha=0.3)
    # Below the panel, as names can be long
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False)
figure.savefig(runs_folder() / "accuracy_by_layer.png", dpi=120)
print("saved", runs_folder() / "accuracy_by_layer.png")
