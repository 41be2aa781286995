"""Hours that each row of the published card takes on this machine, from rates of some seconds.

Every row runs its own loops at its full size: resolution, batch, heads, precision and compilation,
but on few images that are made for it (JPEGs of 500 x 375 px, packed as `relloc.prepare` packs
them, and sets laid out as VOC, COCO and Cityscapes) and for few steps. Its rates are multiplied
by its work: the images of the published splits and the epochs or iterations of its settings.

"rate" is as the row runs, in units a second; "computing" with samples in memory, "reading" that of
the worker processes alone; the slower of the two limits the row. With decode=device "reading" has
the decoding on that device, too, and what limits is left empty. Hours are of the lower of rate and
reading. Left out are monitors and checkpoints of the pretraining, the start of each command
with its compiling, and `label_free_in1k`, which takes under a minute (docs/benchmarks.md).

    python benchmarks/card.py --json card.json --record relloc/reports/hours.csv
    python benchmarks/card.py --tiny
"""

import argparse
import functools
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from card_timing import Bench, Sizes, evaluation_rates, pretraining_rate
from card_work import TimedRow, evaluation_amounts, pretraining_amounts, timed_row
from features import images_below
from input import PACKINGS
from report import arguments, commit, environment, tell
from written_data import (
    write_cityscapes,
    write_coco,
    write_photographs,
    write_voc_with_proposals,
)

from relloc.data.folder import FolderImages
from relloc.data.image_set import ImageSet, Splits
from relloc.data.packing import pack
from relloc.data.processes import without_progress
from relloc.models.backbone import Backbone
from relloc.reports.hours import PRETRAINING, MeasuredHours, record_hours, rows_of_card
from relloc.runs import build, engine, settings
from relloc.runs.build import ChosenEvaluation, Evaluating, Pretraining

FULL = Sizes(
    photographs=1024,
    warm_up=16,
    batches=64,
    first_steps=24,
    steps=48,
    annotated=96,
    tested=128,
)
TINY = Sizes(
    photographs=8,
    warm_up=2,
    batches=8,
    first_steps=1,
    steps=1,
    annotated=4,
    tested=2,
    most_classes=3,
    most_kept=80,
)


def _write_few_cityscapes(root: Path, n_images: int, n_tested: int) -> None:
    """Writes fewer images than of other sets, as each takes a second to write."""
    write_cityscapes(root, n_images // 2, max(1, n_tested // 8))


# The sets with boxes or class maps. All those of VOC are one.
WRITERS: Mapping[str, Callable[[Path, int, int], None]] = {
    "voc": write_voc_with_proposals,
    "coco": write_coco,
    "cityscapes": _write_few_cityscapes,
}
ANNOTATED = {
    "voc0712_detection": "voc",
    "voc12aug_fcn": "voc",
    "voc07_finetune": "voc",
    "voc07_finetune_fc": "voc",
    "voc07_fast_rcnn": "voc",
    "coco_mask_rcnn_fpn_1x": "coco",
    "cityscapes_fcn": "cityscapes",
}
_CARD_MODEL = "resnet50"
# Settings of evaluations with which they take a CPU a second or two.
_TINY_VIEW = ("batch=4", "view.short_px=36", "view.crop_px=32")
_TINY_LINEAR = (*_TINY_VIEW, "augment.crop_px=32", "grid_lrs=[1]")
_TINY_SVM = ("batch=4", "view.short_px=36", "view.side_px=32", "layers=[feature5]", "costs=[1]")
_TINY_DETECTION = (
    *("batch=2", "images_per_gpu=1", "test_batch=2"),
    *("augment.short_px=[64]", "augment.long_px=96", "view.box=[96,64]"),
)
_TINY_CROPS = ("batch=2", "augment.box=[96,64]", "augment.crop_px=48", "view.box=[96,64]")
_TINY_EVALUATIONS = {
    "linear_in1k": _TINY_LINEAR,
    "linear_avgpool": _TINY_LINEAR,
    "linear_places205": (*_TINY_LINEAR, "augment.short_px=36"),
    "linear_inat18": _TINY_LINEAR,
    "knn_in1k": _TINY_VIEW,
    "voc07_svm": _TINY_SVM,
    "voc07_low_shot": (*_TINY_SVM, "shots=[1]", "draws=1"),
    "semisup_1": (*_TINY_VIEW, "augment.crop_px=32"),
    "semisup_10": (*_TINY_VIEW, "augment.crop_px=32"),
    "voc0712_detection": _TINY_DETECTION,
    "coco_mask_rcnn_fpn_1x": _TINY_DETECTION,
    "voc12aug_fcn": _TINY_CROPS,
    "cityscapes_fcn": (*_TINY_CROPS, "view.window_px=48", "view.stride_px=32"),
    "voc07_finetune": ("batch=2", "view.crop_px=64", "crops=1"),
    "voc07_finetune_fc": ("batch=2", "view.crop_px=64", "crops=1"),
    "voc07_fast_rcnn": ("augment.box=[96,64]", "view.box=[96,64]"),
}
_TINY_PRETRAINING = (
    "model=small",
    "recipe.images_per_step=4",
    "recipe.images_per_batch_norm=2",
)


def main(words: Sequence[str] | None = None) -> None:
    """Times the rows that `words` ask for, by default those of the command line."""
    options = _options(words)
    sizes = TINY if options.tiny else FULL
    timed = []
    with (
        tempfile.TemporaryDirectory(prefix="relloc_card_") as temporary,
        warnings.catch_warnings(),
    ):
        # Made sets are smaller than the published ones.
        warnings.filterwarnings("ignore", message=".*the published set")
        folder = Path(temporary)
        images = images_below(options.images) if options.images else _photographs(folder, sizes)
        for name in _in_order(options.rows):
            started = time.monotonic()
            row = _timed(name, images, folder, sizes, options)
            timed.append(row)
            # Whoever stops a long run has what was measured by then.
            taken_s = time.monotonic() - started
            told = f"{name}: {row.hours:.3g} h, timed in {taken_s:.0f} s"
            print(told, file=sys.stderr, flush=True)
            if options.record:
                record_hours(options.record, [_measured(row)])
    lines = [line for row in timed for line in _lines(row)]
    totals = {f"hours of {row.name}": row.hours for row in timed}
    totals["hours of all"] = sum(totals.values())
    title = "the published card on one GPU"
    if options.tiny:
        title += ", at tiny sizes, whose rates and hours mean nothing"
    tell(title, lines, totals, options.json, settings=vars(options))


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=rows_of_card(),
        default=rows_of_card(),
        metavar="ROW",
        help=f"default: all; {', '.join(rows_of_card())}",
    )
    parser.add_argument(
        "--images", type=Path, help="photographs, or a folder that relloc.prepare packed of them"
    )
    parser.add_argument(
        "--record",
        type=Path,
        metavar="FILE",
        help="write hours there for reports, which read relloc/reports/hours.csv",
    )
    parser.add_argument(
        "--tiny", action="store_true", help="tiny sizes and networks, to see whether all rows run"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        help="settings of relloc.train and relloc.evaluate alike, such as workers=8; after --",
    )
    options = parser.parse_args(words)
    if options.tiny and options.record:
        parser.error("--record would keep the hours of --tiny, which mean nothing: leave out one")
    if options.record and (options.overrides or options.images):
        parser.error(
            "--record keeps the hours of the card's own settings: leave out --images and settings"
        )
    return options


def _in_order(names: Sequence[str]) -> list[str]:
    """Returns the rows with the pretraining last, as it switches torch to the fastest kernels."""
    return sorted(names, key=lambda name: name == PRETRAINING)


def _photographs(folder: Path, sizes: Sizes) -> ImageSet:
    """Writes photographs, and returns them as relloc.prepare packs them."""
    written = folder / "photographs"
    write_photographs(written, sizes.photographs)
    paths = sorted(str(path) for path in written.iterdir())
    files = Splits(
        train=FolderImages(name="made", split="train", paths=paths),
        # Packing takes two splits; nothing is read of this one.
        held_out=FolderImages(name="made", split="val", paths=paths[:1]),
    )
    packed = folder / "packed"
    pack(files, packed, PACKINGS["JPEG shards"], workers=4, progress=without_progress)
    return images_below(packed)


def _timed(
    name: str, images: ImageSet, folder: Path, sizes: Sizes, options: argparse.Namespace
) -> TimedRow:
    """Returns a row with its rates."""
    if name == PRETRAINING:
        pretraining = _pretraining(options.overrides, tiny=options.tiny)
        how = engine.resolve_engine(pretraining.engine)
        amounts = pretraining_amounts(pretraining, _published(pretraining.data.source)[0])
        rate = pretraining_rate(pretraining, how, images, sizes)
        return timed_row(name, amounts, {"training": rate})
    root = folder
    if name in ANNOTATED:
        root = folder / ANNOTATED[name]
        if not root.exists():
            WRITERS[ANNOTATED[name]](root, sizes.annotated, sizes.tested)
    model = "small" if options.tiny else _CARD_MODEL
    config, chosen = _evaluating(name, model, root, options.overrides, tiny=options.tiny)
    how = engine.resolve_engine(config.engine)
    backbone = _network(model)
    how.place(backbone)
    bench = Bench(
        backbone=backbone,
        images=images,
        config=config.encode_config(how, shown=False),
        sizes=sizes,
    )
    if chosen.data is None:
        raise TypeError(f"eval={name} brings no data set")
    n_images = _published(chosen.data.source)
    splits = Splits(train=images, held_out=images)
    if name in ANNOTATED:
        splits = chosen.data.read(identified=False)
    rates = evaluation_rates(chosen.evaluation, bench, chosen.data.name, n_images, splits)
    return timed_row(name, evaluation_amounts(chosen.evaluation, *n_images), rates)


def _pretraining(overrides: Sequence[str], *, tiny: bool) -> Pretraining:
    """Returns the settings of the card's pretraining."""
    words = ["experiment=card2022", "data.root=nowhere", "eval=[]"]
    if tiny:
        words += _TINY_PRETRAINING
    words += overrides
    return build.pretraining(settings.compose("train", words).config)


def _evaluating(
    name: str, model: str, root: Path, overrides: Sequence[str], *, tiny: bool
) -> tuple[Evaluating, ChosenEvaluation]:
    """Returns the settings of a command that measures one row, and the evaluation among them."""
    data = f"eval.{name}.data"
    words = ["checkpoint=random", f"model={model}", f"eval=[{name}]", f"{data}.root={root}"]
    if name == "voc07_fast_rcnn":
        words.append(f"{data}.proposals={root / 'proposals'}")
    if tiny:
        words += [f"eval.{name}.{word}" for word in _TINY_EVALUATIONS[name]]
    words += overrides
    config = build.evaluating(settings.compose("evaluate", words).config)
    (chosen,) = config.evaluations
    return config, chosen


@functools.cache
def _network(model: str) -> Backbone:
    """Returns a network with random weights, the same one for all rows: it is compiled once."""
    return build.model_of_conf(model).backbone(0).eval()


def _published(source: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the numbers of images of the published splits, to train on and to test on."""
    train, held_out = source["published_images"].values()
    return train, held_out


def _lines(row: TimedRow) -> list[dict[str, Any]]:
    """Returns the lines of the printed table, one for each kind of work."""
    lines = []
    for each in row.works:
        rate = each.rate
        line = {
            "row": row.name,
            "work": each.amount.work,
            "unit": each.amount.unit,
            "amount": round(each.amount.n),
            "rate": rate.running,
            "computing": rate.computing,
            "reading": rate.reading,
            "limited by": rate.limited_by,
            "hours": each.hours,
        }
        lines.append(line)
    return lines


def _measured(row: TimedRow) -> MeasuredHours:
    """Returns a row as reports keep it."""
    machine = environment()
    cores = machine["cores"]
    hardware = machine["gpus"][0] if machine["gpus"] else machine["cpu"]
    return MeasuredHours(
        row=row.name,
        hours=row.hours,
        limited_by=row.limited_by,
        leaves_out="monitors and checkpoints" if row.name == PRETRAINING else "",
        hardware=f"one {hardware}, {cores} cores",
        date=machine["date"][:10],
        source=f"benchmarks/card.py, commit {commit()}",
    )


if __name__ == "__main__":
    started = time.monotonic()
    main()
    print(f"{time.monotonic() - started:.0f} s in all")
