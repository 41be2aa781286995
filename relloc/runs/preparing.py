"""Checking a data set and packing it, with what a person sees of that."""

from pathlib import Path
from typing import Any

from rich.table import Table

from relloc import machine
from relloc.data.check import Check, SplitCheck, check
from relloc.data.image_set import ROLES
from relloc.data.manifest import check_hashes, read_manifest
from relloc.data.packing import CHECK_FILE, Packing, pack
from relloc.runs import console
from relloc.runs.build import Preparing
from relloc.runs.invocation import Invocation
from relloc.terminal import escaped


def prepare(settings: Preparing, invocation: Invocation) -> None:
    """Check every image of a data set; with `out` set, pack it there in the same pass."""
    data = settings.data.read(identified=settings.out is not None)  # packing goes by what the images are
    packed = settings.data.shards
    workers = settings.workers or machine.cores()
    if settings.out is not None:
        out = Path(settings.out).absolute()
        found = pack(
            data,
            out,
            settings.packing,
            published=settings.published,
            workers=workers,
            progress=_progress("pack"),
        )
        _tell(found)
        _tell_packed(out, settings.packing)
        _say_next_training(invocation, settings.out)
        return
    if packed:
        check_hashes(Path(packed), _progress("hashes"))
    _tell(check(data, published=settings.published, workers=workers, progress=_progress("check")))
    if packed:
        console.say("checked")
        _say_next_training(invocation, packed)
    else:
        console.say("checked; out=FOLDER packs these images into shards")
        console.say_next("prepare", *(word for word in invocation.words if not word.startswith("out=")), "out=SHARDS")


def _progress(what: str) -> Any:
    return lambda total, done: console.progress_bar(what, total, done)


def _tell(found: Check) -> None:
    console.console.print(_table(found))  # markup is off there
    for line in found.findings() or ["nothing wrong was found"]:
        console.say(line)


def _table(found: Check) -> Table:
    table = Table(title=f"{escaped(found.name)}, as checked")
    table.add_column("images", overflow="fold")
    columns = [_column(split) for split in (found.train, found.held_out)]
    for split in (found.train, found.held_out):
        table.add_column(escaped(split.split), justify="right", overflow="fold")
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    table.add_row(f"also in {escaped(found.train.split)}", "", str(found.leaked.n))
    return table


def _column(split: SplitCheck) -> dict[str, str]:
    fewest, most = split.class_images or ("", "")
    least, median, greatest = split.short_px or ("", "", "")
    return {
        "all": str(split.images),
        "published": "" if split.published is None else str(split.published),
        "of a class": f"{fewest} to {most}" if split.class_images else "no labels",
        "short side": f"{least} to {greatest} px",
        "short side, median": f"{median} px",
        "unreadable": str(len(split.unreadable)),
        "repeated": str(split.repeated.n),
        "small": str(split.small.n),
        "elongated": str(split.long.n),
        "of one color": str(split.single_color.n),
    }


def _tell_packed(out: Path, packing: Packing) -> None:
    manifest = read_manifest(out)
    for split in (manifest[role] for role in ROLES):
        n_bytes = sum(tar["bytes"] for tar in split["shards"])
        stored = split["stored"]
        console.say(
            f"packed  {split['split']}: {n_bytes / 1e6:.1f} MB in {len(split['shards'])} tars; {stored['kept']} JPEGs "
            f"kept as they were, {stored['reduced']} reduced to {packing.short_px} px, {stored['encoded']} encoded"
        )
    console.say(f"written {out}; what was checked is in {CHECK_FILE} there")


def _say_next_training(invocation: Invocation, shards: str) -> None:
    console.say_next("train", **{"data": invocation.choices["data"], "data.shards": shards})
