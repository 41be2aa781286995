"""The VOC07 SVM and low-shot protocols by relloc's solver and by LIBLINEAR on the same features.

Ours is run whole: every class, cost, fold, draw and number of shots of each layer that is named.
LIBLINEAR (scikit-learn's LinearSVC as published: tolerance 1e-4, at most 2,000 iterations) is run
on a part, for the first class: all costs on each fold and on all images; and all costs at each
number of shots of one draw. Its whole is that part times the classes, and times the draws. It runs
on one core; the ratio by the clock divides its time by the cores that ours had, as if it were
spread over them for nothing. Where other jobs share the cores, the ratio of processor seconds
tells more.

Features are of squashed 224 px views of PASCAL VOC, or with --classes-root of a folder train/CLASS,
val/CLASS, whose images each show one class (links to folders will do). --features keeps them in a
file, or reads them from there.
"""

import argparse
import dataclasses
import itertools
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from report import arguments, tell
from safetensors.torch import load_file, save_file
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC
from torch import Tensor

from relloc.data.folder import FolderImages, class_folders
from relloc.data.image_set import ImageSet, Splits
from relloc.data.lists import NOT_THERE, THERE, MultiLabeled
from relloc.evals.low_shot import Voc07LowShot, draw
from relloc.evals.voc07_svm import Voc07Svm
from relloc.evaluation.calibration import calibration_batches
from relloc.evaluation.contract import Context, Evaluation, NullState
from relloc.features.bank import Bank, fill_bank
from relloc.features.batch_norm import recalibrate
from relloc.features.source import LiveFeatures
from relloc.runs import build, engine
from relloc.runs.command_settings import Evaluating
from relloc.runs.evaluated_models import evaluated_models
from relloc.runs.settings import conf_dir

LAYERS = ("feature1", "feature2", "feature3", "feature4", "feature5")
SVM, LOW_SHOT = "voc07_svm", "voc07_low_shot"
# The published settings (protocols.md 3.1); `dual` is what scikit-learn had by default
PUBLISHED: dict[str, Any] = {
    "class_weight": {1: 2, -1: 1},
    "tol": 1e-4,
    "max_iter": 2000,
    "dual": True,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a protocol by LIBLINEAR: `_clocks`, parts in the whole, fits not converged."""

    spent: np.ndarray
    of: int
    unconverged: int


def main() -> None:
    options = _options()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        who = [f"checkpoint={options.checkpoint}", f"model={options.model}"]
        nowhere = [
            f"eval.{name}.data.root=nowhere" for name in (SVM, LOW_SHOT) if options.classes_root
        ]
        words = [*who, f"eval=[{SVM},{LOW_SHOT}]", *nowhere, *options.overrides]
        config = build.evaluating(compose("evaluate", words))
    how = engine.resolve_engine(config.engine)
    kept = _kept_features(config, how, options)
    train = _bank(kept, "train", options.layers)
    held_out = _bank(kept, "held_out", options.layers)
    context = _context(config, how, train, held_out)
    of_name = {one.name: one.evaluation for one in config.evaluations}
    rows = []
    ours, theirs = np.zeros(2), np.zeros(2)
    for layer in options.layers:
        for name, liblinear in ((SVM, _liblinear_svm), (LOW_SHOT, _liblinear_low_shot)):
            evaluation = dataclasses.replace(of_name[name], layers=(layer,))  # pyright: ignore[reportArgumentType]
            spent, found = _timed(evaluation, context)
            row = {"layer": layer, "protocol": name}
            rows.append({**row, "side": "ours", "part": "whole", **_told(spent), "mAP": found})
            if layer not in options.liblinear:
                continue
            part = liblinear(evaluation, train, layer)
            theirs_whole = part.spent * part.of
            said = {
                "part": f"1 of {part.of}",
                **_told(part.spent),
                "whole, processor s": float(theirs_whole[1]),
            }
            rows.append({**row, "side": "LIBLINEAR", **said, "unconverged": part.unconverged})
            ours, theirs = ours + spent, theirs + theirs_whole
    cores = torch.get_num_threads() if how.device.type == "cpu" else 1
    ours_s = sum(row["s"] for row in rows if row["side"] == "ours")
    ratios: dict[str, float] = {"ours, all layers, in all s": ours_s}
    if theirs.any():
        by_clock, by_processors = map(float, theirs / ours)
        ratios[f"LIBLINEAR's whole on {cores} cores, over ours, same layers"] = by_clock / cores
        ratios["the same by processor seconds"] = by_processors
    ratios["1-minute load at the end"] = os.getloadavg()[0]
    title = f"SVMs: {train.n} and {held_out.n} images, {train.n_classes} classes; {how}"
    tell(title, rows, ratios, options.json, settings=vars(options))


def _options() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--checkpoint", default="random")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument(
        "--classes-root", help="a folder with train/CLASS and val/CLASS, in place of VOC"
    )
    parser.add_argument(
        "--most", type=int, default=5011, help="images of each split, evenly spaced"
    )
    parser.add_argument(
        "--recalibrate",
        action="store_true",
        help="recalibrate batch norm on calibration_images= training images (for random weights)",
    )
    parser.add_argument("--features", type=Path, help="a safetensors file that keeps features")
    parser.add_argument(
        "--layers", type=_names, default=list(LAYERS), help="with commas between them"
    )
    parser.add_argument(
        "--liblinear", type=_names, default=["feature4"], help="layers that LIBLINEAR is timed on"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        help=f"settings of relloc.evaluate, such as eval.{SVM}.data.root=VOC",
    )
    return parser.parse_args()


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _kept_features(
    config: Evaluating, how: engine.Engine, options: argparse.Namespace
) -> dict[str, Tensor]:
    if options.features and options.features.exists():
        return load_file(options.features)
    kept = _features(config, how, options)
    if options.features:
        save_file(kept, options.features)
    return kept


def _context(config: Evaluating, how: engine.Engine, train: Bank, held_out: Bank) -> Context:
    classes = tuple(map(str, range(train.n_classes)))
    trained, tested = (
        FolderImages(name="kept", split=split, paths=[], classes=classes)
        for split in ("train", "val")
    )
    return Context(
        backbone=evaluated_models(config)[0].backbone,
        splits=Splits(train=trained, held_out=tested),
        train=train,
        held_out=held_out,
        encode_config=config.encode_config(how),
        seed=0,
        state=NullState(),
        folder=Path(),
    )


def _bank(kept: dict[str, Tensor], split: str, layers: list[str]) -> Bank:
    present = kept[f"{split} present"]
    features = {layer: kept[f"{split} {layer}"] for layer in layers}
    return Bank(features=features, labels=present, n_classes=present.shape[1], channels={})


def _features(
    config: Evaluating, how: engine.Engine, options: argparse.Namespace
) -> dict[str, Tensor]:
    backbone = evaluated_models(config)[0].backbone.eval()
    how.place(backbone)
    root = options.classes_root
    if root:
        splits = class_folders(name="classes", root=root, train="train", val="val")
    else:
        splits = (config.evaluations[0].data or config.data).read()
    view = config.evaluations[0].evaluation.view
    if options.recalibrate:
        calibration_images = calibration_batches(
            splits.train,
            view,
            n_images=config.calibration_images,
            seed=config.seed,
            config=config.encode_config(how),
        )
        recalibrate(backbone, calibration_images)
    kept = {}
    for split, images in (("train", splits.train), ("held_out", splits.held_out)):
        live = LiveFeatures(
            backbone, images, config.encode_config(how), view, labels=_present(images)
        )
        places = torch.linspace(0, live.n - 1, min(live.n, options.most)).long()
        bank = fill_bank(live, LAYERS, 64, torch.device("cpu"), places)
        kept |= {f"{split} {layer}": rows for layer, rows in bank.features.items()}
        kept[f"{split} present"] = bank.labels
    return kept


def _present(images: ImageSet) -> Tensor:
    if isinstance(images, MultiLabeled):
        return torch.as_tensor(images.presence())
    shown = torch.nn.functional.one_hot(torch.as_tensor(images.labels), len(images.classes))
    return torch.where(shown > 0, THERE, NOT_THERE)


def _clocks() -> np.ndarray:
    """Seconds by the clock, and of this process on all cores."""
    return np.array([time.perf_counter(), time.process_time()])


def _told(spent: np.ndarray) -> dict[str, float]:
    return dict(zip(("s", "processor s"), map(float, spent), strict=True))


def _timed(evaluation: Evaluation, context: Context) -> tuple[np.ndarray, str]:
    started = _clocks()
    found = {score.metric: score.value for score in evaluation.run(context)}
    means = [value for metric, value in found.items() if metric == "map" or metric[5:].isdigit()]
    return _clocks() - started, " to ".join(
        f"{value:.1f}" for value in dict.fromkeys((means[0], means[-1]))
    )


def _liblinear_svm(evaluation: Voc07Svm, train: Bank, layer: str) -> Part:
    x, y = _published(train, layer)
    folds = [trained_on for trained_on, _ in StratifiedKFold(evaluation.folds).split(x, y)]
    parts = [(x[rows], y[rows]) for rows in (*folds, slice(None))]
    return _fitted(parts, evaluation.costs, of=train.n_classes)


def _liblinear_low_shot(evaluation: Voc07LowShot, train: Bank, layer: str) -> Part:
    x, y = _published(train, layer)
    most = min(int((y == 1).sum()), int((y == -1).sum()) // 19)
    drawn = [draw(train.labels, (0,), k, 1, 0)[0, 0].numpy() for k in evaluation.shots if k <= most]
    parts = [(x[rows], y[rows]) for rows in drawn]
    return _fitted(parts, evaluation.costs, of=train.n_classes * evaluation.draws)


def _published(bank: Bank, layer: str) -> tuple[np.ndarray, np.ndarray]:
    """Normalized features in float64, and the signs of the first class."""
    rows = bank.features[layer].double().numpy()
    rows = rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-5)
    return rows, np.where(bank.labels[:, 0].numpy() == THERE, 1, -1)


def _fitted(parts: list[tuple[np.ndarray, np.ndarray]], costs: Sequence[float], *, of: int) -> Part:
    started = _clocks()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", ConvergenceWarning)
        for cost, (x, y) in itertools.product(costs, parts):
            LinearSVC(C=cost, **PUBLISHED).fit(x, y)
    return Part(spent=_clocks() - started, of=of, unconverged=len(told))


if __name__ == "__main__":
    main()
