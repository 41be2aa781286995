"""Checks a data set and packs it into shards: what `python -m relloc.prepare` runs.

The work itself is in `relloc.data.check` and `relloc.data.packing`; this module chooses between
them, shows progress and prints the findings.
"""

import functools
from pathlib import Path

from rich.table import Table

from relloc import machine
from relloc.data.annotations import CheckedAnnotations
from relloc.data.check import Check, SplitCheck, check
from relloc.data.image_set import ROLES
from relloc.data.manifest import check_hashes, read_manifest
from relloc.data.packing import CHECK_FILE, Packing, pack
from relloc.data.unnamed import UNNAMED
from relloc.errors import TooManyUnreadable
from relloc.runs import console
from relloc.runs.command_settings import Preparing
from relloc.runs.data_sets import DataSet
from relloc.runs.invocation import Invocation
from relloc.runs.settings import members
from relloc.terminal import escaped, quantity


def prepare(settings: Preparing, invocation: Invocation) -> None:
    """Checks every image of a data set; with `out` set, packs it there in the same pass.

    Raises:
        UsageError: the settings contradict each other, or `out` can't be used.
        DataError: the data set is missing, or its shards are damaged.
        TooManyUnreadable: all is done and printed, but runs on these images would stop.
    """
    findings = _prepared(settings, invocation)
    # At last, so that nothing is lost by it. Scripts can rely on the exit code.
    _refuse_too_many_unreadable(findings, settings.data)


def _prepared(settings: Preparing, invocation: Invocation) -> Check:
    """Checks a data set or packs it, prints what was found, and returns it."""
    # Only packing needs the identity (digest) of the images: it resumes shards of the same ones.
    data = settings.data.read(identified=settings.out is not None)
    shards = settings.data.shards
    workers = settings.workers or machine.cores()
    if settings.out is not None:
        # Check and pack in one pass over the images, which are read only once.
        shards = settings.out
        out = Path(settings.out).absolute()
        progress = functools.partial(console.progress_bar, "pack")
        findings = pack(
            data,
            out,
            settings.packing,
            workers=workers,
            progress=progress,
            print_message=console.print_message,
        )
        _print_findings(findings)
        _print_packed(out, settings.packing)
        if isinstance(data.train, CheckedAnnotations):
            console.print_message(
                "        without boxes and masks: packed images serve pretraining, and detection "
                "and segmentation read the originals"
            )
    else:
        if shards:
            # Copying may have damaged shards: compare them with the hashes of their manifest.
            check_hashes(Path(shards), functools.partial(console.progress_bar, "hashes"))
        progress = functools.partial(console.progress_bar, "check")
        findings = check(data, workers=workers, progress=progress)
        _print_findings(findings)
        is_annotated = isinstance(data.train, CheckedAnnotations)
        console.print_message(
            "checked"
            if shards or is_annotated
            else "checked; out=FOLDER packs these images into shards"
        )
        # Packed images have no boxes and masks: packing them is no step that most want next.
        if is_annotated:
            return findings
    if shards:
        # A folder may be called like a data set that it does not hold.
        name = UNNAMED if data.is_unnamed else data.train.name
        member = _data_member(name, invocation)
        console.print_next("train", **{"data": member, "data.shards": shards})
    else:
        # The same command, with a folder to pack into.
        words = [word for word in invocation.words if not word.startswith("out=")]
        console.print_next("prepare", *words, "out=SHARDS")
    return findings


def _data_member(name: str, invocation: Invocation) -> str:
    """Returns the member of conf/data to train on packed images of the data set `name` with."""
    # A known data set has a member of its own, with the recipe that fits it.
    if name in members("data"):
        return name
    # "photos", the default, holds sample images: packed images of the user's are a "folder".
    chosen = str(invocation.choices["data"])
    return UNNAMED if chosen == "photos" else chosen


def _print_findings(findings: Check) -> None:
    """Prints the table of counts, and a line for each thing that may be wrong."""
    # The console prints text as it is: it reads no markup in names of files.
    console.console.print(_table(findings))
    console.print_message(*(findings.findings() or ["nothing wrong was found"]))


def _refuse_too_many_unreadable(findings: Check, data: DataSet) -> None:
    """Raises `TooManyUnreadable` if a split has more unreadable images than a run may skip."""
    counts = []
    for split in (findings.train, findings.held_out):
        n_unreadable = len(split.unreadable)
        if n_unreadable > data.unreadable_share * split.images:
            counts.append(f"{n_unreadable} of {quantity(split.images, 'image')} of {split.split}")
    if counts:
        raise TooManyUnreadable(
            f"{' and '.join(counts)} can't be read, more than {data.setting}.unreadable_share="
            f"{data.unreadable_share} allows, so that runs on these images stop: repair them, or "
            "raise the share"
        )


def _table(findings: Check) -> Table:
    """Returns a table with a column for each split and a row for each count."""
    table = Table(title=f"{escaped(findings.name)}, as checked")
    table.add_column("images", overflow="fold")
    for split in (findings.train, findings.held_out):
        table.add_column(escaped(split.split), justify="right", overflow="fold")
    held_out = _column(findings.held_out)
    for name, value in _column(findings.train).items():
        table.add_row(name, value, held_out[name])
    # Held-out images that are training images too would flatter every evaluation.
    table.add_row(f"also in {escaped(findings.train.split)}", "", str(findings.leaked.n))
    return table


def _column(split: SplitCheck) -> dict[str, str]:
    """Returns the cells of one split by the name of their row; no cell is ever left out."""
    published = "" if split.published is None else str(split.published)
    class_sizes = "no labels"
    if split.class_images:
        smallest, largest = split.class_images
        class_sizes = f"{smallest} to {largest}"
    # A split without any readable image has no sizes.
    least, median, greatest = split.short_px or ("", "", "")
    cells = {
        "all": str(split.images),
        "published": published,
        "of a class": class_sizes,
        "short side": f"{least} to {greatest} px",
        "short side, median": f"{median} px",
        "unreadable": str(len(split.unreadable)),
        "repeated": str(split.repeated.n),
        "small": str(split.small.n),
        "elongated": str(split.long.n),
        "of one color": str(split.single_color.n),
    }
    if split.objects is not None:
        cells["objects"] = str(split.objects)
    return cells


def _print_packed(out: Path, packing: Packing) -> None:
    """Prints the size of each packed split, and how its images were stored."""
    manifest = read_manifest(out)
    for role in ROLES:
        split = manifest[role]
        stored = split["stored"]
        tars = split["shards"]
        one, several = "JPEG kept as it was", "JPEGs kept as they were"
        if packing.in_pixels:
            one, several = "image kept in its size", "images kept in their size"
        parts = [
            quantity(stored["kept"], one, several),
            f"{stored['reduced']} reduced to {packing.short_px} px",
        ]
        if packing.enlarge:
            parts.append(f"{stored.get('enlarged', 0)} enlarged to it")
        if not packing.in_pixels:
            parts.append(f"{stored['encoded']} encoded")
        megabytes = sum(tar["bytes"] for tar in tars) / 1e6
        console.print_message(
            f"packed  {split['split']}: {megabytes:.1f} MB in {quantity(len(tars), 'tar')}; "
            f"{', '.join(parts)}"
        )
    console.print_message(f"written {out}; what was checked is in {CHECK_FILE} there")
