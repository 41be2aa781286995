"""Checking a data set and packing it, with what a person sees of that."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from relloc import checks, machine
from relloc.data.check import Check, SplitCheck, check
from relloc.data.image_set import ROLES
from relloc.data.manifest import check_hashes, read_manifest
from relloc.data.packing import CHECK_FILE, Packing, pack
from relloc.errors import UsageError
from relloc.runs import assemble, console
from relloc.terminal import escaped


def prepare(config: DictConfig) -> None:
    """Check every image of a data set; with `out` set, pack it there in the same pass."""
    if config.out == "":
        raise UsageError("out= names no folder: give out=FOLDER to pack into, or leave it out to check only")
    packing = _packing(config)
    workers = _workers(config)
    are_packed = OmegaConf.select(config, "data.shards") is not None
    if config.out is not None and are_packed:
        raise UsageError("data.shards names images that are packed already: give data.root to pack the originals")
    data = assemble.splits(config.data, identified=config.out is not None)  # packing goes by what the images are
    published = _published(config)
    if config.out is None:
        if are_packed:
            check_hashes(Path(config.data.shards), _progress("hashes"))
        _tell(check(data, published=published, workers=workers, progress=_progress("check")))
        console.say("checked" if are_packed else "checked; out=FOLDER packs these images into shards")
        _say_next_of_checked(config, are_packed)
        return
    out = Path(config.out).absolute()
    found = pack(data, out, packing, published=published, workers=workers, progress=_progress("pack"))
    _tell(found)
    _tell_packed(out, str(config.out), config)


def _packing(config: DictConfig) -> Packing:
    numbers = {name: checks.whole(name, config[name]) for name in ("short_px", "quality", "images_per_shard")}
    return Packing(subsampling=str(config.subsampling), **numbers)


def _workers(config: DictConfig) -> int:
    if config.workers == "auto":
        return machine.cores()
    return checks.whole("workers", config.workers)


def _published(config: DictConfig) -> Mapping[str, int] | None:
    node = OmegaConf.select(config, "data.source.published_images")
    return None if node is None else assemble.plain(node)


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


def _tell_packed(out: Path, asked: str, config: DictConfig) -> None:
    manifest = read_manifest(out)
    for split in (manifest[role] for role in ROLES):
        n_bytes = sum(tar["bytes"] for tar in split["shards"])
        stored = split["stored"]
        console.say(
            f"packed  {split['split']}: {n_bytes / 1e6:.1f} MB in {len(split['shards'])} tars; {stored['kept']} JPEGs "
            f"kept as they were, {stored['reduced']} reduced to {config.short_px} px, {stored['encoded']} encoded"
        )
    console.say(f"written {out}; what was checked is in {CHECK_FILE} there")
    console.say_next("train", **{"data": _member(config), "data.shards": asked})


def _say_next_of_checked(config: DictConfig, are_packed: bool) -> None:
    """To train on what is packed, or to pack it, with the words that were typed."""
    if are_packed:
        console.say_next("train", **{"data": _member(config), "data.shards": str(config.data.shards)})
    else:
        typed = [word for word in HydraConfig.get().overrides.task if not word.startswith("out=")]
        console.say_next("prepare", *typed, "out=SHARDS")


def _member(config: DictConfig) -> str:
    return HydraConfig.get().runtime.choices["data"]
