"""Folders called train, val, test and the like: refusing to make one set of images of several splits."""

import collections
import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path

from relloc.data.listing import class_folders_of
from relloc.errors import DataError
from relloc.terminal import escaped

_UNLABELED = ("unlabeled", "unlabelled")  # as of STL-10: to train on, together with train
_TRAIN_WORDS = ("training", "trainval", "train", "trn", "tr", *_UNLABELED)
_VAL_WORDS = ("validation", "valid", "minival", "val", "dev")
_OTHER_WORDS = (
    "testing",
    "test",
    "tst",
    "evaluation",
    "eval",
    "heldout",
    "held_out",
    "held-out",
    "holdout",
    "query",
)
_WORDS = (*_TRAIN_WORDS, *_VAL_WORDS, *_OTHER_WORDS)
# A word of its own: not the train of "restrain", but those of train2017, seg_train, "Training images" and traindata.
_WORD = re.compile(
    rf"(?<![a-z])({'|'.join(_WORDS)})(?=$|[^a-z]|(?:data|set|images?|imgs?)(?![a-z]))"
)
_FOLD = re.compile(r"(?:cv[\W_]*)?(?:fold|split)[\W_]*(\d+)")  # of a cross-validation
_CAPITAL_WITHIN = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


@dataclasses.dataclass(kw_only=True)
class Branch:
    """A folder with how many images lie in and below it, and its folders that hold images."""

    path: Path
    images: int = 0
    folders: dict[str, "Branch"] = dataclasses.field(default_factory=dict)


def images_by_folder(root: Path, paths: Sequence[str]) -> Branch:
    """How many of the images lie in each folder below `root`."""
    counts = collections.Counter(path.rpartition("/")[0] for path in paths)
    trunk = Branch(path=root, images=len(paths))
    for folder, count in counts.items():
        here = trunk
        for name in Path(os.path.relpath(folder, root)).parts:
            here = here.folders.setdefault(name, Branch(path=here.path / name))
            here.images += count
    return trunk


def refuse_pooled_splits(branch: Branch, *, alone: bool) -> None:
    """Refuse to take several splits of a data set for one set of images.

    Folders are splits of one set where they lie beside each other, hold images, and their names differ in a word
    such as train, val or test, and else at most in numbers, or are folds with numbers. `alone` says that the set has no
    other root, so that it may have labels.

    Raises:
        DataError: there are such folders in or below `branch`.
    """
    waiting = [branch]
    while waiting:
        here = waiting.pop()
        splits = _splits_in(here)
        if splits:
            raise DataError(_message(branch, here, splits, alone=alone))
        waiting += here.folders.values()


def _splits_in(branch: Branch) -> list[str]:
    """The folders of a folder that are splits of one set, two or more; else none."""
    alike: dict[str, dict[str, tuple[str, ...]]] = {}
    for name in branch.folders:
        part, rest = _part_and_rest(name)
        if part:
            alike.setdefault(rest, {})[name] = part
    return next((sorted(parts) for parts in alike.values() if len(set(parts.values())) > 1), [])


def _in_words(name: str) -> str:
    """A folder's name in lower case; that of TrainImages as train_images."""
    return _CAPITAL_WITHIN.sub("_", name).lower()


def _part_and_rest(name: str) -> tuple[tuple[str, ...], str]:
    """Which part of a set a folder says to be, such as ("train",), or none; and the letters of what it says besides.

    So train_1 and train_2 are the same part.
    """
    words = _in_words(name)
    if fold := _FOLD.fullmatch(words):
        return (fold[1],), "fold"
    part = tuple("train" if word in _UNLABELED else word for word in _WORD.findall(words))
    letters = re.sub(r"(?:(?!\*)[\W\d_])+", " ", _WORD.sub("*", words))
    return part, re.sub(r"\*(?: ?\*)+", "*", letters).strip()


def _message(root: Branch, parent: Branch, splits: Sequence[str], *, alone: bool) -> str:
    parts = parent.folders
    held = [
        f"{escaped(name)} ({parts[name].images} images in {len(parts[name].folders)} folders)"
        for name in splits
    ]
    train, val = _by_word(splits, _TRAIN_WORDS), _by_word(splits, (*_VAL_WORDS, *_OTHER_WORDS))
    first = train or splits[0]
    below = "" if parent is root else f"data.root={parent.path} "
    ways = []
    if alone and train and val and parts[train].folders:
        if parts[train].folders.keys() == parts[val].folders.keys():
            ways.append(
                f"{below}data.source.train={train} data.source.val={val} takes them as the splits they are"
            )
        elif not class_folders_of(parts[val].path):
            ways.append(
                f"{val} has no class folders: sort its images into folders called as those of {train}, and both splits "
                "are taken with their labels"
            )
    ways.append(f"data.root={parent.path / first} takes {first} alone, without labels")
    ways.append("data.source.pool_splits=true takes all as one set without labels")
    return (
        f"{parent.path} holds several splits of a data set: {', '.join(held)}. Taken as one set without labels, what "
        f"is to be tested on would be trained on. {'; '.join(ways)}"
    )


def _by_word(splits: Sequence[str], words: Sequence[str]) -> str | None:
    """The first of the folders, in the order of the words, whose name has one of them."""
    found = [(word[1], name) for name in splits if (word := _WORD.search(_in_words(name)))]
    return next((name for wanted in words for word, name in found if word == wanted), None)
