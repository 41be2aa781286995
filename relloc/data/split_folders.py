"""Folders called train, val, test and the like: refusing to make one set of images of several splits."""

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from relloc.data.listing import class_folders_of
from relloc.errors import DataError
from relloc.terminal import escaped

_UNLABELED = ("unlabeled", "unlabelled")  # as of STL-10: to train on, together with train
_TRAIN_WORDS = ("training", "trainval", "train", "trn", "tr", *_UNLABELED)
_VAL_WORDS = ("validation", "valid", "minival", "val", "dev")
_OTHER_WORDS = ("testing", "test", "tst", "evaluation", "eval", "heldout", "held_out", "held-out", "holdout", "query")
_WORDS = (*_TRAIN_WORDS, *_VAL_WORDS, *_OTHER_WORDS)
# A word of its own: not the train of "restrain", but those of train2017, seg_train, "Training images" and traindata.
_WORD = re.compile(rf"(?<![a-z])({'|'.join(_WORDS)})(?=$|[^a-z]|(?:data|set|images?|imgs?)(?![a-z]))")
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
    counts: dict[str, int] = {}
    for path in paths:
        folder = path.rpartition("/")[0]
        counts[folder] = counts.get(folder, 0) + 1
    trunk = Branch(path=root)
    for folder, count in counts.items():
        relative = os.path.relpath(folder, root)
        here = trunk
        here.images += count
        for name in () if relative == "." else relative.split("/"):
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
    for each in _branches(branch):
        splits = _splits_in(each)
        if splits:
            raise DataError(_message(branch, each, splits, alone=alone))


def _branches(branch: Branch) -> Iterator[Branch]:
    waiting = [branch]
    while waiting:
        here = waiting.pop()
        yield here
        waiting += here.folders.values()


def _splits_in(branch: Branch) -> dict[str, Branch]:
    """The folders of a folder that are splits of one set, two or more, by their names; else none."""
    alike: dict[str, dict[str, Branch]] = {}
    parts: dict[str, set[tuple[str, ...]]] = {}
    for name, branch_of_name in branch.folders.items():
        part = _part_of_set(name)
        if part:
            rest = _without_part(name)
            alike.setdefault(rest, {})[name] = branch_of_name
            parts.setdefault(rest, set()).add(part)
    return next((splits for rest, splits in alike.items() if len(parts[rest]) > 1), {})


def _in_words(name: str) -> str:
    """A folder's name in lower case; that of TrainImages as train_images."""
    return _CAPITAL_WITHIN.sub("_", name).lower()


def _part_of_set(name: str) -> tuple[str, ...]:
    """Which part of a set a folder says to be, such as ("train",); train_1 and train_2 are the same. Empty: of none."""
    if fold := _FOLD.fullmatch(_in_words(name)):
        return (fold[1],)
    return tuple("train" if word in _UNLABELED else word for word in _WORD.findall(_in_words(name)))


def _without_part(name: str) -> str:
    """What a folder's name says beside that: its letters alone."""
    if _FOLD.fullmatch(_in_words(name)):
        return "fold"
    letters = re.sub(r"(?:(?!\*)[\W\d_])+", " ", _WORD.sub("*", _in_words(name)))
    return re.sub(r"\*(?: ?\*)+", "*", letters).strip()


def _message(root: Branch, parent: Branch, splits: Mapping[str, Branch], *, alone: bool) -> str:
    classes = {name: set(part.folders) for name, part in splits.items()}
    held = ", ".join(f"{escaped(name)} ({_holding(part)})" for name, part in sorted(splits.items()))
    train, val = _by_word(splits, _TRAIN_WORDS), _by_word(splits, (*_VAL_WORDS, *_OTHER_WORDS))
    first = train or next(iter(splits))
    below = "" if parent is root else f"data.root={parent.path} "
    ways = []
    if alone and train and val and classes[train]:
        if classes[train] == classes[val]:
            ways.append(f"{below}data.source.train={train} data.source.val={val} takes them as the splits they are")
        elif not class_folders_of(splits[val].path):
            ways.append(
                f"{val} has no class folders: sort its images into folders called as those of {train}, and both splits "
                "are taken with their labels"
            )
    ways.append(f"data.root={parent.path / first} takes {first} alone, without labels")
    ways.append("data.source.pool_splits=true takes all as one set without labels")
    return (
        f"{parent.path} holds several splits of a data set: {held}. Taken as one set without labels, what is to be "
        f"tested on would be trained on. {'; '.join(ways)}"
    )


def _by_word(splits: Mapping[str, Branch], words: Sequence[str]) -> str | None:
    """The first of the folders, in the order of the words, whose name has one of them."""
    found = ((name, _WORD.search(_in_words(name))) for name in splits)
    ranked = sorted((words.index(word[1]), name) for name, word in found if word and word[1] in words)
    return ranked[0][1] if ranked else None


def _holding(part: Branch) -> str:
    return (
        f"{part.images} images in {len(part.folders)} class folders" if part.folders else f"{part.images} images, flat"
    )
