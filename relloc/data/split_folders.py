"""Recognizes folders that are the splits of a data set, and refuses to pool them for training.

Unlabeled images are taken from every folder below a root. If these folders are called train and
test, or fold1 and fold2, pooling them would train on images that are meant for testing.
"""

import collections
import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path

from relloc.data.listing import class_folders_of
from relloc.errors import DataError
from relloc.terminal import escaped, quantity

# STL-10 has such images, which are meant to be trained on together with those of train.
_UNLABELED = ("unlabeled", "unlabelled")
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
# These words stand alone: train2017, seg_train, "Training images" and traindata have one, but
# "restrain" has not.
_WORD = re.compile(
    rf"(?<![a-z])({'|'.join(_WORDS)})(?=$|[^a-z]|(?:data|set|images?|imgs?)(?![a-z]))"
)
# A fold of a cross-validation, such as "fold1" or "cv_split-2".
_FOLD = re.compile(r"(?:cv[\W_]*)?(?:fold|split)[\W_]*(\d+)")
_CAPITAL_WITHIN = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


@dataclasses.dataclass(kw_only=True)
class FolderTree:
    """A folder, the number of images in and below it, and its folders that hold images."""

    path: Path
    images: int = 0
    folders: dict[str, "FolderTree"] = dataclasses.field(default_factory=dict)


def images_by_folder(root: Path, paths: Sequence[str]) -> FolderTree:
    """Returns the tree of folders below `root` with the number of images in and below each."""
    counts = collections.Counter(path.rpartition("/")[0] for path in paths)
    root_tree = FolderTree(path=root, images=len(paths))
    for folder, count in counts.items():
        # Every folder on the way to this one has its images, too.
        tree = root_tree
        for name in Path(os.path.relpath(folder, root)).parts:
            tree = tree.folders.setdefault(name, FolderTree(path=tree.path / name))
            tree.images += count
    return root_tree


def refuse_pooled_splits(tree: FolderTree, *, is_only_root: bool) -> None:
    """Raises an error if a tree of folders holds several splits of a data set.

    Folders are splits of one data set if they lie beside each other, hold images, and their names
    differ in a word such as train, val or test, and otherwise at most in numbers; or if they are
    numbered folds. `is_only_root` is true if no other
    root is pooled with the tree, so that it may be a labeled set.

    Raises:
        DataError: there are such folders in or below `tree`.
    """
    waiting = [tree]
    while waiting:
        parent = waiting.pop()
        splits = _splits_in(parent)
        if splits:
            raise DataError(_message(tree, parent, splits, is_only_root=is_only_root))
        waiting += parent.folders.values()


def _splits_in(tree: FolderTree) -> list[str]:
    """Returns the folders of a folder that are splits of one data set: two or more, or none."""
    # Folders whose names have the same stem, which is the name without the split, belong together.
    names_by_stem: dict[str, dict[str, tuple[str, ...]]] = {}
    for name in tree.folders:
        split_words, stem = _split_words_and_stem(name)
        if split_words:
            names_by_stem.setdefault(stem, {})[name] = split_words
    for split_words_by_name in names_by_stem.values():
        if len(set(split_words_by_name.values())) > 1:
            return sorted(split_words_by_name)
    return []


def _in_words(name: str) -> str:
    """Returns a folder's name in lower case with its words separated: TrainImages, train_images."""
    return _CAPITAL_WITHIN.sub("_", name).lower()


def _split_words_and_stem(name: str) -> tuple[tuple[str, ...], str]:
    """Returns the words of a folder's name that name a split, and the stem: the other letters.

    Numbers do not count, so that train_1 and train_2 are the same split. The fold of a
    cross-validation is named by its number.
    """
    words = _in_words(name)
    fold = _FOLD.fullmatch(words)
    if fold:
        return (fold[1],), "fold"
    split_words = tuple("train" if word in _UNLABELED else word for word in _WORD.findall(words))
    # A star stands for each split word, a space for anything but letters, and then one star for all
    # stars in a row: seg_train_2 becomes "seg *".
    starred = _WORD.sub("*", words)
    letters = re.sub(r"(?:(?!\*)[\W\d_])+", " ", starred)
    stem = re.sub(r"\*(?: ?\*)+", "*", letters)
    return split_words, stem.strip()


def _message(
    root: FolderTree, parent: FolderTree, splits: Sequence[str], *, is_only_root: bool
) -> str:
    """Returns the error message: which splits were found, and the settings that are possible."""
    folders = parent.folders
    counts = []
    for name in splits:
        split = folders[name]
        counts.append(
            f"{escaped(name)} ({quantity(split.images, 'image')} in "
            f"{quantity(len(split.folders), 'folder')})"
        )
    train = _by_word(splits, _TRAIN_WORDS)
    val = _by_word(splits, (*_VAL_WORDS, *_OTHER_WORDS))
    first = train or splits[0]
    root_setting = "" if parent is root else f"data.root={parent.path} "
    ways = []
    # With class folders they may be a labeled data set, if both splits have the same classes.
    if is_only_root and train and val and folders[train].folders:
        if folders[train].folders.keys() == folders[val].folders.keys():
            ways.append(
                f"{root_setting}data.source.train={train} data.source.val={val} takes them as the "
                "splits they are"
            )
        elif not class_folders_of(folders[val].path):
            ways.append(
                f"{val} has no class folders: sort its images into folders called as those of "
                f"{train}, and both splits are taken with their labels"
            )
    ways.append(f"data.root={parent.path / first} takes {first} alone, without labels")
    ways.append("data.source.pool_splits=true takes all as one set without labels")
    return (
        f"{parent.path} holds several splits of a data set: {', '.join(counts)}. Pooling "
        f"them would train on images that are meant for testing. {'; '.join(ways)}"
    )


def _by_word(splits: Sequence[str], words: Sequence[str]) -> str | None:
    """Returns the first folder, in the order of `words`, whose name has one of the words."""
    first_words = []
    for name in splits:
        match = _WORD.search(_in_words(name))
        if match:
            first_words.append((match[1], name))
    for wanted in words:
        for word, name in first_words:
            if word == wanted:
                return name
    return None
