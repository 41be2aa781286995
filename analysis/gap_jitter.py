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
# sweep over both settings is a map: the mean over seeds, and the lowest and highest of them.
# Then: for which measures gap and jitter matter at all, what the paper's and the card's choice lose
# against the best, whether measures agree on the order of the points, and after how many images
# that order stands.

# %% [markdown]
# `RELLOC_RUNS` names the folder of runs, or `RELLOC_MLFLOW` a store in its place, and
# `RELLOC_SELECT` chooses among them, such as `sweep=gaps eval=knn grid.gap_px=0,21`. Open this in
# Jupyter through jupytext, or run it by Python:
#
#     python analysis/gap_jitter.py
#
# saves the figures in `figures` in the folder of runs, as PNG, SVG and PDF.

# %%
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
)
from permutation import p_of_effect, p_of_interaction

from relloc.errors import DataError
from relloc.figures.style import (
    TWO_COLUMNS,
    category_looks,
    ink_on,
    ordered_looks,
    save,
    use_style,
)
from relloc.reports.best_points import (
    CHOICES,
    DEEP,
    GAP,
    JITTER,
    PATCH,
    SETTLED,
    WATCHED,
    half_width_of_difference,
    jitter_width,
    rank_correlation,
    settles,
)
from relloc.reports.sweep import EFFECT

use_style()
MOST_MAPS = 15
SIGNIFICANT = 0.05
results = load_results()
results = results.loc[results["weights"].eq("pretrained") & results["spread"].eq("")]
# Of shortcuts neither direction is good in itself; here a training that uses less of one is better
is_shortcut = results["metric"].str.startswith(EFFECT)
has_direction = results["higher_is_better"].notna() | is_shortcut
results = results.loc[results["headline"] & has_direction & results["layer"].isin(DEEP)]
has_grid = results["pretraining"].map(lambda settings: GAP in settings and JITTER in settings)
results = results.loc[has_grid]
if results.empty:
    raise DataError("no results of trainings with grid.gap_px are selected: change RELLOC_SELECT")


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
jitters = sorted(results["jitter"].unique(), key=jitter_width)
points = results[["gap", "jitter"]].drop_duplicates().itertuples(index=False, name=None)
points = sorted(points, key=lambda point: (point[0], jitter_width(point[1])))

# %% [markdown]
# The nearest points of the sweep to the paper's choice (conf/grid/doersch2015.yaml) and the card's
# (conf/grid/mmselfsup.yaml), in shares of the side of a patch:

# %%
nearest = {}
lines = []
for name, choice in CHOICES.items():
    distances = {(gap, jitter): choice.distance(gap, jitter, patch_px) for gap, jitter in points}
    nearest[name] = min(distances, key=distances.__getitem__)
    gap, moved = choice.gap_px / choice.patch_px, choice.moved_px / choice.patch_px
    lines.append(
        {
            "choice": name,
            "of a patch": f"gap {gap:.2f}, jitter {moved:.2f}",
            "nearest gap_px": nearest[name][0],
            "nearest jitter_px": nearest[name][1],
            "distance": round(distances[nearest[name]], 2),
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
several_batch_norms = of_images["batch_norm"].nunique() > 1
several_sets = len(of_images[["dataset", "images", "n"]].drop_duplicates()) > 1
for shared, rows in results.groupby(keys, observed=True, sort=False):
    about = dict(zip(keys, shared, strict=True))
    words = [f"{about['eval']} {about['metric']}", about["layer"]]
    if several_batch_norms and about["batch_norm"] == "recalibrated":
        words.append("recalibrated")
    name = ", ".join(filter(None, words))
    # The same measure on two data sets
    if name in measures and several_sets and about["eval"] != "pretext":
        name = f"{name}, {about['dataset']}, n = {about['n']:,}"
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

# %% [markdown]
# Do gap and jitter matter beside the scatter of seeds? Their values are dealt anew to trainings,
# those of the gap among trainings of one jitter and the other way round: p is the share of such
# deals in which means differ at least as much. That assumes nothing about the scatter, which may
# differ from point to point. Small p in one of twenty measures are what chance gives, and the p of
# a gap is over all jitters: read the maps, too.
#
# Whether the best gap depends on the jitter is their interaction: what points differ in beyond the
# sum of an effect of the gap and one of the jitter. There is no deal of values that leaves such a
# sum as it is, so that what trainings differ in from the fitted sum is dealt among all of them
# (Freedman and Lane, Journal of Business & Economic Statistics 1, 1983). That assumes that
# trainings scatter alike at all points, so that these differences may change places, and it holds
# the better the more trainings there are.

# %%
controls = load_results()
controls = controls.loc[controls["weights"].eq("random") & controls["spread"].eq("")]


def random_mean(about):
    """Returns the mean of random weights in the same measure, nan if they were not measured."""
    same = np.logical_and.reduce([controls[key].eq(about[key]) for key in keys])
    return controls.loc[same, "value"].mean()


lines = []
for name, means in measures.items():
    deviations = by_seed[name].groupby(level=["gap", "jitter"]).std()
    lines.append(
        {
            "measure": name,
            "unit": means.attrs["unit"],
            "lowest": means["mean"].min(),
            "highest": means["mean"].max(),
            "random": random_mean(means.attrs),
            "least deviation over seeds": deviations.min(),
            "median": deviations.median(),
            "largest": deviations.max(),
            "p of gap": p_of_effect(by_seed[name], "gap"),
            "p of jitter": p_of_effect(by_seed[name], "jitter"),
            "p of interaction": p_of_interaction(by_seed[name]),
        }
    )
effects = as_frame(lines).set_index("measure")
effects.round(4)

# %%
marks = dict(zip(CHOICES, (("D", "#D55E00"), ("s", "#CC79A7")), strict=True))


def draw_map(axis, name):
    """Draws one measure: a cell for each point, and the choices of the paper and of the card."""
    means = measures[name]
    grid = means["mean"].unstack("gap").reindex(index=jitters, columns=gaps)
    colors = "cividis" if sign[name] > 0 else "cividis_r"
    image = axis.imshow(grid.to_numpy(float), origin="lower", aspect="auto", cmap=colors)
    axis.grid(visible=False)
    axis.set_facecolor("0.85")
    for (y, x), value in np.ndenumerate(grid.to_numpy(float)):
        if not np.isnan(value):
            ink = ink_on(np.asarray(image.cmap(image.norm(value))))
            # z: no minus sign before zero
            axis.text(x, y + 0.05, f"{value:z.1f}", ha="center", va="center", color=ink, fontsize=7)
            of_seeds = by_seed[name].loc[gaps[x], jitters[y]]
            if len(of_seeds) > 1:
                text = f"{of_seeds.min():z.1f}…{of_seeds.max():z.1f}"
                axis.text(x, y - 0.29, text, ha="center", va="center", color=ink, fontsize=4.5)
    for choice, (gap, jitter) in nearest.items():
        marker, color = marks[choice]
        # In an upper corner of the cell, above the number
        shift = -0.36 if choice == "paper" else 0.36
        axis.plot(
            gaps.index(gap) + shift,
            jitters.index(jitter) + 0.37,
            marker,
            markersize=4,
            color=color,
            markeredgecolor="white",
            label=f"nearest to the {choice}'s choice",
        )
    axis.set_xticks(range(len(gaps)), [f"{gap:g}" for gap in gaps])
    axis.set_yticks(range(len(jitters)), jitters)
    axis.set(xlabel="gap (px)", ylabel="jitter (px)")

    # What is measured, and below it on what and by how many trainings
    about = means.attrs
    seeds = int(means["n"].max())
    unit = about["unit"]
    heading = f"{about['eval']} {about['metric']}" + (
        f", {about['layer']}" if about["layer"] else ""
    )
    pairs = "pairs" if about["eval"] == "pretext" else "images"
    on_what = f"{about['dataset']}, {about['n']:,} {pairs}"
    beside = [f"{seeds} seeds"]
    random = random_mean(about)
    if not np.isnan(random):
        beside.append(f"random weights {random:.1f}")
    lines = [f"{heading} ({unit})", on_what, ", ".join(beside)]
    axis.set_title("\n".join(lines), fontsize=6.5)


def draw_maps(names, file_name):
    """Draws and saves a figure of some measures.

    Raises:
        MixedRows: there are more than a figure can hold.
    """
    if len(names) > MOST_MAPS:
        raise MixedRows(
            f"{len(names)} measures are selected ({', '.join(names)}): a figure has {MOST_MAPS} "
            "at most. Choose by RELLOC_SELECT, for example RELLOC_SELECT='eval=knn,pretext'"
        )
    figure, axes = panel_axes(len(names), height=0.85 + 0.36 * len(jitters))
    for axis, name in zip(axes, names, strict=True):
        draw_map(axis, name)
    legend_below(figure, axes)
    for file in save(figure, figures_folder(), file_name):
        print("saved", file)


of_shortcuts = [name for name, means in measures.items() if means.attrs["eval"] == "shortcuts"]
draw_maps([name for name in measures if name not in of_shortcuts], "gap_jitter")

# %% [markdown]
# How much of each shortcut is there for the network or used by it (docs/studies.md tells what the
# numbers are), where less is better:

# %%
if of_shortcuts:
    draw_maps(of_shortcuts, "gap_jitter_shortcuts")

# %% [markdown]
# What the nearest points lose against the best point of each measure, in its unit, with Welch's
# 95 % interval of the difference, which takes the deviation of each point by itself. The best point
# was chosen among all by the same numbers, so that some loss is to be expected by chance:

# %%
lines, best_points = [], {}
for name, means in measures.items():
    best = best_points[name] = (sign[name] * means["mean"]).idxmax()
    line = {"measure": name, "best gap_px": best[0], "best jitter_px": best[1]}
    line["best"] = means["mean"][best]
    for choice, point in nearest.items():
        if point not in means.index:
            continue
        # A loss is negative, also where lower values are better
        loss = sign[name] * (means["mean"][point] - means["mean"][best])
        values = by_seed[name]
        half = 0.0 if point == best else half_width_of_difference(values[point], values[best])
        line |= {choice: loss, f"{choice} low": loss - half, f"{choice} high": loss + half}
    lines.append(line)
losses = as_frame(lines).set_index("measure")
losses.round(2)

# %% [markdown]
# Spearman's rank correlation of the means of the points, between measures:

# %%
signed: Frame = pd.DataFrame({name: means["mean"] * sign[name] for name, means in measures.items()})
agreement: Frame = pd.DataFrame(
    [[rank_correlation(signed[one], signed[other]) for other in signed] for one in signed],
    index=signed.columns,
    columns=signed.columns,
)
agreement.round(2)

# %% [markdown]
# After how many images the order of the points is that of the end: rank correlation of what was
# watched in training, at each of its steps, with what was watched last. (The results at the end are
# of other images, and would order close points otherwise.)

# %%
curves = load_curves()
at = "images_seen" if curves["images_seen"].notna().all() else "step"
curves = curves.loc[curves["metric"].str.startswith(WATCHED)]
# Positions of the pretext task have curves of their own, which are parts of the whole
curves = curves.loc[~curves["metric"].str.startswith("monitor/pretext/top1_")]
has_deep_layer = curves["metric"].str.contains("feature[345]|pretext")
curves = curves.loc[has_deep_layer & curves["pretraining"].map(lambda settings: GAP in settings)]
orders = {}
if len(curves):
    check_points(curves)
    curves = with_points(curves)
    for metric, rows in curves.groupby("metric", sort=False):
        of_points = rows.pivot_table(index=at, columns=["gap", "jitter"], values="value")
        of_points = of_points.dropna()
        if len(of_points) < 2:
            continue
        end = of_points.iloc[-1]
        found = {step: rank_correlation(values, end) for step, values in of_points.iterrows()}
        orders[metric.removeprefix("monitor/")] = pd.Series(found)

settled: Frame = pd.Series({name: settles(order) for name, order in orders.items()}, dtype=float)
settled.rename(f"settled (rho {SETTLED} or more from there on)").to_frame()

# %%
# Numbers fit into the cells of a small table alone
shows_numbers = len(measures) <= 12
side = 0.3 if shows_numbers else 0.17
matrix_height = 0.9 + side * len(measures)
heights = [matrix_height, 2.4] if orders else [matrix_height]
figure, axes = plt.subplots(
    len(heights),
    1,
    figsize=(TWO_COLUMNS, sum(heights)),
    height_ratios=heights,
    squeeze=False,
    layout="constrained",
)
matrix = axes[0, 0]
image = matrix.imshow(agreement.to_numpy(float), vmin=-1, vmax=1, cmap="cividis")
matrix.grid(visible=False)
matrix.set_facecolor("0.85")
for (y, x), value in np.ndenumerate(agreement.to_numpy(float)):
    if shows_numbers and not np.isnan(value):
        ink = ink_on(np.asarray(image.cmap(image.norm(value))))
        matrix.text(x, y, f"{value:.1f}", ha="center", va="center", color=ink, fontsize=6)
numbers = range(1, len(measures) + 1)
matrix.set_xticks(range(len(measures)), [str(number) for number in numbers], fontsize=6)
names = [f"{name} ({number})" for number, name in zip(numbers, measures, strict=True)]
matrix.set_yticks(range(len(measures)), names, fontsize=6)
matrix.set_title(f"rank correlation over {len(points)} points")
figure.colorbar(image, ax=matrix, label="Spearman's rho", pad=0.02, shrink=0.8)
if orders:
    curve_axis = axes[1, 0]
    # Layers are ordered; the pretext task stands apart
    layered = [name for name in orders if name.startswith("knn")]
    looks = dict(zip(layered, ordered_looks(len(layered)), strict=True))
    for name, order in orders.items():
        look = looks.get(name) or category_looks(2)[1] | {"marker": "D"}
        x = order.index * (1000 if at == "images_seen" else 1)
        curve_axis.plot(x, order, label=name, **look)
    curve_axis.axhline(SETTLED, color="0.6", linewidth=0.8, linestyle=(0, (1, 2)))
    curve_axis.set_xlabel("images seen (thousands)" if at == "images_seen" else "step")
    curve_axis.set(ylabel="rho with the order at the end", ylim=(-1.05, 1.05))
    curve_axis.set_title("when the order of points settles")
    curve_axis.legend(loc="lower right", fontsize=6)
for file in save(figure, figures_folder(), "gap_jitter_order"):
    print("saved", file)


# %%
def told(choice):
    """Returns a phrase on what a choice loses against the best points, of measures of accuracy."""
    gap, jitter = nearest[choice]
    about = f"the point nearest to the {choice}'s choice (gap {gap:g}, jitter {jitter} px)"
    if choice not in losses:
        return f"{about} was not measured"
    found = losses.loc[accuracies, [choice, f"{choice} high"]].dropna()
    surely = int((found[f"{choice} high"] < 0).sum())
    return (
        f"{about} is {-found[choice].mean():.1f} below the best on average, more than chance "
        f"explains in {surely} of {len(found)}"
    )


# Measures of shortcuts have units of their own, and are told apart. So is pretext accuracy: it says
# how hard gap and jitter make the question, not how good the features are.
of_pretext = [name for name, means in measures.items() if means.attrs["eval"] == "pretext"]
told_apart = {*of_shortcuts, *of_pretext}
accuracies = [name for name in measures if name not in told_apart] or list(measures)
pairs = agreement.loc[accuracies, accuracies].to_numpy()
pairs = pairs[np.triu_indices(len(pairs), 1)]
common = as_frame({"point": [best_points[name] for name in accuracies]})["point"].value_counts()
top = common.index[0]
answer = (
    f"**Gap {top[0]:g} and jitter {top[1]} px are best in {common.iloc[0]} of {len(accuracies)} "
    f"measures over {len(points)} points"
)
# A single measure agrees with no other, and of two points there is no rank correlation
if np.isfinite(pairs).any():
    answer += (
        f"; measures agree on the order with a median rank correlation of {np.nanmedian(pairs):.2f}"
    )
answer += f"**; {told('paper')}; {told('card')}."
p_values = effects.loc[accuracies, ["p of gap", "p of jitter"]].dropna()
if len(p_values):
    counts = (p_values < SIGNIFICANT).sum()
    answer += (
        f" Beside the scatter of seeds, the gap matters in {counts['p of gap']} and the jitter in "
        f"{counts['p of jitter']} of {len(p_values)} measures (p below {SIGNIFICANT})."
    )
p_of_both = effects.loc[accuracies, "p of interaction"].dropna()
if len(p_of_both):
    n_depend = int((p_of_both < SIGNIFICANT).sum())
    answer += f" In {n_depend} of {len(p_of_both)} the effect of one depends on the other."
if of_pretext and accuracies != of_pretext:
    rhos = agreement.loc[of_pretext, accuracies].to_numpy()
    if np.isfinite(rhos).any():
        rho = np.nanmedian(rhos)
        answer += f" Pretext accuracy agrees with them with a median rank correlation of {rho:.2f}."
below_random = effects["highest"] < effects["random"]
if below_random[accuracies].any():
    answer += (
        f" Random weights are better than every point in {int(below_random[accuracies].sum())} "
        "measures: these trainings were too short or saw too few images to tell more."
    )
if len(settled):
    n_settled = int(settled.notna().sum())
    answer += f" The order of points settled before the end in {n_settled} of {len(settled)} curves"
    if n_settled:
        if at == "images_seen":
            answer += f", at a median of {settled.median() * 1e6:,.0f} images"
        else:
            answer += f", at a median of {settled.median():.0f} steps"
    answer += "."
print(answer)
