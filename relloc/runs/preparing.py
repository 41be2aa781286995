"""Checking a data set and packing it, with what a person sees of that."""

import functools
from pathlib import Path

from rich.table import Table

from relloc import machine
from relloc.data.check import Check, SplitCheck, check
from relloc.data.image_set import ROLES
from relloc.data.manifest import check_hashes, read_manifest
from relloc.data.packing import CHECK_FILE, Packing, pack
from relloc.runs import console
from relloc.runs.build import Preparing
from relloc.runs.invocation import Invocation
from relloc.runs.settings import members
from relloc.terminal import escaped


def prepare(settings: Preparing, invocation: Invocation) -> None:
    """Check every image of a data set; with `out` set, pack it there in the same pass."""
    data = settings.data.read(
        identified=settings.out is not None
    )  # packing goes by what the images are
    shards, workers = settings.data.shards, settings.workers or machine.cores()
    if settings.out is not None:
        shards, out = settings.out, Path(settings.out).absolute()
        progress = functools.partial(console.progress_bar, "pack")
        found = pack(
            data,
            out,
            settings.packing,
            published=settings.published,
            workers=workers,
            progress=progress,
        )
        _say_found(found)
        _say_packed(out, settings.packing)
    else:
        if shards:
            check_hashes(Path(shards), functools.partial(console.progress_bar, "hashes"))
        progress = functools.partial(console.progress_bar, "check")
        _say_found(check(data, published=settings.published, workers=workers, progress=progress))
        console.say("checked" if shards else "checked; out=FOLDER packs these images into shards")
    if shards:
        console.say_next(
            "train", **{"data": _member(data.train.name, invocation), "data.shards": shards}
        )
    else:
        console.say_next(
            "prepare",
            *(word for word in invocation.words if not word.startswith("out=")),
            "out=SHARDS",
        )


def _member(name: str, invocation: Invocation) -> str:
    """The member of conf/data that packed images of that name are trained on by: their own, whatever was typed."""
    chosen = str(invocation.choices["data"])
    if name in members("data"):
        return name
    return (
        "folder" if chosen == "photos" else chosen
    )  # photos is what stands where nothing was typed


def _say_found(found: Check) -> None:
    console.console.print(_table(found))  # markup is off there
    console.say(*(found.findings() or ["nothing wrong was found"]))


def _table(found: Check) -> Table:
    table = Table(title=f"{escaped(found.name)}, as checked")
    table.add_column("images", overflow="fold")
    for split in (found.train, found.held_out):
        table.add_column(escaped(split.split), justify="right", overflow="fold")
    held_out = _column(found.held_out)
    for name, value in _column(found.train).items():
        table.add_row(name, value, held_out[name])
    table.add_row(f"also in {escaped(found.train.split)}", "", str(found.leaked.n))
    return table


def _column(split: SplitCheck) -> dict[str, str]:
    least, median, greatest = split.short_px or ("", "", "")
    return {
        "all": str(split.images),
        "published": "" if split.published is None else str(split.published),
        "of a class": "{} to {}".format(*split.class_images) if split.class_images else "no labels",
        "short side": f"{least} to {greatest} px",
        "short side, median": f"{median} px",
        "unreadable": str(len(split.unreadable)),
        "repeated": str(split.repeated.n),
        "small": str(split.small.n),
        "elongated": str(split.long.n),
        "of one color": str(split.single_color.n),
    }


def _say_packed(out: Path, packing: Packing) -> None:
    manifest = read_manifest(out)
    for role in ROLES:
        split, stored = manifest[role], manifest[role]["stored"]
        n_bytes = sum(tar["bytes"] for tar in split["shards"])
        console.say(
            f"packed  {split['split']}: {n_bytes / 1e6:.1f} MB in {len(split['shards'])} tars; {stored['kept']} JPEGs "
            f"kept as they were, {stored['reduced']} reduced to {packing.short_px} px, {stored['encoded']} encoded"
        )
    console.say(f"written {out}; what was checked is in {CHECK_FILE} there")
