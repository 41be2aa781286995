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
# # Which gap and jitter are best, and is it the same for all measures?
#
# The paper leaves a gap of half a patch and moves patches by up to 7 px, against shortcuts over the
# borders of patches; the published card has a gap of a third of a patch. Here each measure of a
# sweep over both settings is a map: the mean over seeds, with half the width of its 95 % interval.
# Then: what the paper's and the card's choice lose against the best, whether measures agree on the
# order of the points, and after how many images that order stands.

# %% [markdown]
# `RELLOC_RUNS` names the folder of runs, or `RELLOC_MLFLOW` a store in its place, and
# `RELLOC_SELECT` chooses among them, such as `sweep=gaps eval=knn grid.gap_px=0,21`. Open this in
# Jupyter through jupytext, or run it by Python:
#
#     python analysis/gap_jitter.py
#
# saves the figures in `figures` in the folder of runs, as PNG, SVG and PDF.

# %%
import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from draw import legend_below, panel_axes
from load import (
    LINE,
    PANEL,
    Frame,
    MixedRows,
    as_frame,
    differing_settings,
    figures_folder,
    load_curves,
    load_results,
    over_seeds,
    statistics,
)
from scipy.stats import spearmanr

from relloc.reports.style import (
    TWO_COLUMNS,
    category_looks,
    ink_on,
    ordered_looks,
    save,
    use_style,
)

use_style()
GAP, JITTER, PATCH = "grid.gap_px", "grid.jitter_px", "grid.patch_px"
DEEP = ["", "feature3", "feature4", "feature5"]
MOST_MAPS = 15
results = load_results()
results = results.loc[results["weights"].eq("pretrained") & results["spread"].eq("")]
# Of shortcuts neither direction is good in itself; here a training that uses less of one is better
is_shortcut = results["metric"].str.startswith("effect_")
has_direction = results["higher_is_better"].notna() | is_shortcut
results = results.loc[results["headline"] & has_direction & results["layer"].isin(DEEP)]
has_grid = results["pretraining"].map(lambda settings: GAP in settings and JITTER in settings)
results = results.loc[has_grid]
if results.empty:
    raise LookupError("no results of trainings with grid.gap_px are selected: change RELLOC_SELECT")


def check_points(frame):
    """Refuses trainings that differ in more than gap, jitter and seed."""
    others = {
        name: values
        for name, values in differing_settings(frame).items()
        if name not in (GAP, JITTER)
    }
    if others or frame["train_images"].nunique() > 1:
        phrases = [f"{name} ({', '.join(values)})" for name, values in others.items()]
        name, values = next(iter(others.items()), ("images", ["DIGEST"]))
        raise MixedRows(
            f"trainings differ in more than gap, jitter and seed: "
            f"{'; '.join(phrases) or 'the images that they were trained on'}. Choose by "
            f"RELLOC_SELECT, for example RELLOC_SELECT='{name}={values[0]}', or a sweep"
        )


def width(jitter):
    """Returns how far patches move at most, in px: 7 is -7 to 7, and [0, 21] is 0 to 21."""
    values = json.loads(str(jitter))
    return 2 * values if isinstance(values, (int, float)) else values[1] - values[0]


def with_points(frame):
    """Returns the rows with columns for gap and jitter as they are shown."""
    settings = frame["pretraining"]
    return frame.assign(
        gap=settings.map(lambda one: one[GAP]),
        jitter=settings.map(lambda one: str(one[JITTER]).replace(" ", "")),
    )


check_points(results)
results = with_points(results)
patch_px = results["pretraining"].iloc[0][PATCH]
gaps = sorted(results["gap"].unique())
jitters = sorted(results["jitter"].unique(), key=width)
points = results[["gap", "jitter"]].drop_duplicates().itertuples(index=False, name=None)
points = sorted(points, key=lambda point: (point[0], width(point[1])))

# %% [markdown]
# The nearest points of the sweep to the paper's choice (conf/grid/doersch2015.yaml) and the card's
# (conf/grid/mmselfsup.yaml), in shares of the side of a patch:

# %%
# Gap, width of the jitter and side of a patch in px
CHOICES = {"paper": (48, 14, 96), "card": (21, 21, 64)}
nearest = {}
lines = []
for name, (gap, moved, side) in CHOICES.items():

    def distance(point, gap=gap, moved=moved, side=side):
        """Returns how far a point is from the choice, in sides of a patch."""
        of_gap = point[0] / patch_px - gap / side
        of_jitter = width(point[1]) / patch_px - moved / side
        return float(np.hypot(of_gap, of_jitter))

    nearest[name] = min(points, key=distance)
    chosen = f"gap {gap / side:.2f}, jitter {moved / side:.2f}"
    lines.append(
        {
            "choice": name,
            "of a patch": chosen,
            "nearest gap_px": nearest[name][0],
            "nearest jitter_px": nearest[name][1],
            "distance": round(distance(nearest[name]), 2),
        }
    )
pd.DataFrame(lines).set_index("choice")

# %%
# Each measure by its name: means over seeds by point, and the value of each seed
measures, by_seed = {}, {}
# 1 where higher is better, -1 where lower is
sign = {}
keys = [*PANEL, "batch_norm", "layer"]
of_images = results.loc[results["kind"] != "pretext"]
several_sets = len(of_images[["dataset", "images", "n"]].drop_duplicates()) > 1
for shared, rows in results.groupby(keys, observed=True, sort=False):
    about = dict(zip(keys, shared, strict=True))
    words = [f"{about['eval']} {about['metric']}", about["layer"]]
    if about["batch_norm"] == "recalibrated":
        words.append("recalibrated")
    if several_sets and about["eval"] != "pretext":
        words.append(f"{about['dataset']}, n = {about['n']:,}")
    name = ", ".join(filter(None, words))
    if name in measures:
        differing = [key for key in PANEL if rows[key].iloc[0] != measures[name].attrs[key]]
        raise MixedRows(
            f"{name} was measured in two ways, which differ in {', '.join(differing)}: choose one "
            f"by RELLOC_SELECT, for example RELLOC_SELECT='{differing[0]}={about[differing[0]]}'"
        )
    means = over_seeds(rows, [*LINE, "gap", "jitter"]).droplevel(list(LINE))
    means.attrs = about
    measures[name] = means
    by_seed[name] = rows.groupby(["gap", "jitter", "weights_seed"])["value"].mean()
    is_higher_better = rows["higher_is_better"].iloc[0]
    sign[name] = -1 if is_higher_better is None or not is_higher_better else 1
if len(measures) > MOST_MAPS:
    raise MixedRows(
        f"{len(measures)} measures are selected ({', '.join(measures)}): a figure has {MOST_MAPS} "
        "at most. Choose by RELLOC_SELECT, for example RELLOC_SELECT='eval=knn,pretext'"
    )

# %%
figure, axes = panel_axes(len(measures), height=0.75 + 0.36 * len(jitters))
marks = dict(zip(CHOICES, (("D", "#D55E00"), ("s", "#CC79A7")), strict=True))
for axis, (name, means) in zip(axes, measures.items(), strict=True):
    grid = means["mean"].unstack("gap").reindex(index=jitters, columns=gaps)
    half = ((means["high"] - means["low"]) / 2).where(means["n"] > 1)
    half = half.unstack("gap").reindex(index=jitters, columns=gaps)
    colors = "cividis" if sign[name] > 0 else "cividis_r"
    image = axis.imshow(grid.to_numpy(float), origin="lower", aspect="auto", cmap=colors)
    axis.grid(visible=False)
    axis.set_facecolor("0.85")
    for (y, x), value in np.ndenumerate(grid.to_numpy(float)):
        if np.isnan(value):
            continue
        text = f"{value:.1f}"
        if not np.isnan(half.iloc[y, x]):
            text += f"\n± {half.iloc[y, x]:.1f}"
        ink = ink_on(np.asarray(image.cmap(image.norm(value))))
        axis.text(x, y, text, ha="center", va="center", color=ink, fontsize=6)
    for choice, (gap, jitter) in nearest.items():
        marker, color = marks[choice]
        # In a corner of the cell, beside the number
        shift = -0.36 if choice == "paper" else 0.36
        axis.plot(
            gaps.index(gap) + shift,
            jitters.index(jitter) + 0.33,
            marker,
            markersize=5,
            color=color,
            markeredgecolor="white",
            label=f"nearest to the {choice}'s choice",
        )
    axis.set_xticks(range(len(gaps)), [f"{gap:g}" for gap in gaps])
    axis.set_yticks(range(len(jitters)), jitters)
    unit = means.attrs["unit"]
    pairs = "pairs" if means.attrs["eval"] == "pretext" else "images"
    seeds = int(means["n"].max())
    title = f"{name} ({unit})\nn = {means.attrs['n']:,} {pairs}, {seeds} seeds"
    axis.set_title(title, fontsize=7)
    axis.set(xlabel="gap (px)", ylabel="jitter (px)")
legend_below(figure, axes)
for file in save(figure, figures_folder(), "gap_jitter"):
    print("saved", file)

# %% [markdown]
# What the nearest points lose against the best point of each measure, in its unit, with the 95 %
# interval of the difference over seeds that both have. The best point was chosen among all by the
# same numbers, so that some loss is to be expected by chance:


# %%
def difference(name, point, other):
    """Returns statistics of a measure at one point less that at another, over common seeds.

    A negative difference is a loss, also where lower values are better.
    """
    values = by_seed[name]
    seeds = values.loc[point].index.intersection(values.loc[other].index)
    if not len(seeds):
        return None
    differences = values.loc[point][seeds] - values.loc[other][seeds]
    return statistics(sign[name] * differences.to_numpy())


lines, best_points = [], {}
for name, means in measures.items():
    best = best_points[name] = (sign[name] * means["mean"]).idxmax()
    line = {"measure": name, "best gap_px": best[0], "best jitter_px": best[1]}
    line["best"] = means["mean"][best]
    for choice, point in nearest.items():
        found = difference(name, point, best) if point in means.index else None
        if found:
            line |= {choice: found["mean"], f"{choice} low": found["low"]}
            line |= {f"{choice} high": found["high"], "seeds": int(found["n"])}
    lines.append(line)
losses = as_frame(lines).set_index("measure")
losses.round(2)

# %% [markdown]
# Spearman's rank correlation of the means of the points, between measures:

# %%
signed: Frame = pd.DataFrame({name: means["mean"] * sign[name] for name, means in measures.items()})


def rank_correlation(x, y):
    """Returns Spearman's rho over the points that have both values, nan if one is constant."""
    both = pd.concat([x, y], axis=1).dropna()
    if len(both) < 3 or (both.nunique() < 2).any():
        return np.nan
    return float(np.asarray(spearmanr(both.iloc[:, 0], both.iloc[:, 1]))[0])


agreement: Frame = pd.DataFrame(
    [[rank_correlation(signed[one], signed[other]) for other in signed] for one in signed],
    index=signed.columns,
    columns=signed.columns,
)
agreement.round(2)

# %% [markdown]
# After how many images the order of the points is that of the end: rank correlation of what was
# watched in training, at each of its steps, with the same at the end.

# %%
WATCHED = ("monitor/pretext/top1", "monitor/knn/feature")
SETTLED = 0.9
curves = load_curves()
curves = curves.loc[curves["metric"].str.startswith(WATCHED)]
# Positions of the pretext task have curves of their own, which are parts of the whole
curves = curves.loc[~curves["metric"].str.startswith("monitor/pretext/top1_")]
has_deep_layer = curves["metric"].str.contains("feature[345]|pretext")
curves = curves.loc[has_deep_layer & curves["pretraining"].map(lambda settings: GAP in settings)]
orders = {}
if len(curves):
    check_points(curves)
    curves = with_points(curves)
    at = "images_seen" if curves["images_seen"].notna().all() else "step"
    for metric, rows in curves.groupby("metric", sort=False):
        of_points = rows.pivot_table(index=at, columns=["gap", "jitter"], values="value")
        of_points = of_points.dropna()
        if len(of_points) < 2:
            continue
        end = of_points.iloc[-1]
        found = {step: rank_correlation(values, end) for step, values in of_points.iterrows()}
        orders[metric.removeprefix("monitor/")] = pd.Series(found)


def settles(order):
    """Returns from which step on the order is that of the end, nan if it never was before."""
    below = order[~(order >= SETTLED)]
    later = order if below.empty else order[order.index > below.index[-1]]
    return later.index[0] if len(later) > 1 else np.nan


settled: Frame = pd.Series({name: settles(order) for name, order in orders.items()}, dtype=float)
settled.rename(f"settled (rho {SETTLED} or more from there on)").to_frame()

# %%
figure, (left, right) = plt.subplots(
    1, 2, figsize=(TWO_COLUMNS, 1.6 + 0.17 * len(measures)), width_ratios=[1.3, 1]
)
image = left.imshow(agreement.to_numpy(float), vmin=-1, vmax=1, cmap="cividis")
left.grid(visible=False)
left.set_facecolor("0.85")
for (y, x), value in np.ndenumerate(agreement.to_numpy(float)):
    if not np.isnan(value):
        ink = ink_on(np.asarray(image.cmap(image.norm(value))))
        left.text(x, y, f"{value:.1f}", ha="center", va="center", color=ink, fontsize=5)
numbers = range(1, len(measures) + 1)
left.set_xticks(range(len(measures)), [str(number) for number in numbers])
names = [f"{name} ({number})" for number, name in zip(numbers, measures, strict=True)]
left.set_yticks(range(len(measures)), names, fontsize=6)
left.set_title(f"rank correlation over {len(points)} points")
figure.colorbar(image, ax=left, label="Spearman's rho", shrink=0.8)
if orders:
    # Layers are ordered; the pretext task stands apart
    layered = [name for name in orders if name.startswith("knn")]
    looks = dict(zip(layered, ordered_looks(len(layered)), strict=True))
    for name, order in orders.items():
        look = looks.get(name) or category_looks(2)[1] | {"marker": "D"}
        x = order.index * (1000 if at == "images_seen" else 1)
        right.plot(x, order, label=name, **look)
    right.axhline(SETTLED, color="0.6", linewidth=0.8, linestyle=(0, (1, 2)))
    right.set_xlabel("images seen (thousands)" if at == "images_seen" else "step")
    right.set(ylabel="rho with the order at the end", ylim=(-1.05, 1.05))
    right.set_title("when the order of points settles")
    right.legend(loc="lower right", fontsize=6)
else:
    right.set_axis_off()
for file in save(figure, figures_folder(), "gap_jitter_order"):
    print("saved", file)


# %%
def told(choice):
    """Returns a phrase on what a choice loses against the best points."""
    if choice not in losses:
        return f"the point nearest to the {choice}'s choice shares no seed with the best"
    gap, jitter = nearest[choice]
    loses = losses[f"{choice} high"] < 0
    return (
        f"the point nearest to the {choice}'s choice (gap {gap:g}, jitter {jitter} px) is "
        f"{losses[choice].mean():+.1f} from the best on average, beyond its interval in "
        f"{int(loses.sum())} of {losses[choice].notna().sum()} measures"
    )


pairs = agreement.to_numpy()[np.triu_indices(len(agreement), 1)]
# A single measure agrees with no other
median = np.nanmedian(pairs) if np.isfinite(pairs).any() else np.nan
common = as_frame({"point": list(best_points.values())})["point"].value_counts()
top = common.index[0]
answer = (
    f"**Gap {top[0]:g} and jitter {top[1]} px are best in {common.iloc[0]} of {len(measures)} "
    f"measures over {len(points)} points; measures agree on the order with a median rank "
    f"correlation of {median:.2f}**; {told('paper')}; {told('card')}."
)
if len(settled):
    n_settled = int(settled.notna().sum())
    answer += f" The order of points settled before the end in {n_settled} of {len(settled)} curves"
    if n_settled:
        if at == "images_seen":
            answer += f", at a median of {settled.median() * 1000:.2g} thousand images"
        else:
            answer += f", at a median of {settled.median():.0f} steps"
    answer += "."
print(answer)
