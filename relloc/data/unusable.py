"""Finds images that can't be used without decoding them all, as a training has to know them before.

Found are files that are missing or cut off, and annotations of no use. A file that is damaged in
its middle is found when it is decoded.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

from relloc.data.annotated_folders import ClassMapFolder
from relloc.data.annotations import ObjectImages
from relloc.data.contents import in_threads
from relloc.data.folder import FolderImages, missing_paths
from relloc.data.image_set import ImageSet
from relloc.data.images import ends_whole
from relloc.data.loader import Reasons
from relloc.data.processes import NamedProgress, without_named_progress
from relloc.data.readers import never
from relloc.data.samples import read_samples

# The ends of more files are not read: COCO has 118,287, whose ends take seconds, but those of
# ImageNet's 1.3 million take minutes from a file server.
_MOST_ENDS = 200_000
# Images that a process decodes at once.
_BATCH = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Decode:
    """Reads an image and its mask, in worker processes, for the errors that this raises."""

    images: FolderImages

    def __call__(self, index: int, seed: int) -> None:
        del seed
        self.images.read(index)
        if isinstance(self.images, ClassMapFolder):
            self.images.class_map(index)


def unusable_images(
    images: ImageSet,
    *,
    workers: int,
    stopping: Callable[[], bool] = never,
    progress: NamedProgress = without_named_progress,
) -> Reasons:
    """Returns why images can't be used, by their sources, as far as their files' ends tell.

    Files that do not end as they should are decoded, in `workers` processes. Sets that are no
    files, such as shards, have neither missing files nor truncated ones.

    Raises:
        Interrupted: a process was killed, most often because memory ran out.
    """
    reasons: Reasons = {}
    if isinstance(images, FolderImages):
        reasons.update(dict.fromkeys(missing_paths(images.paths), "is missing"))
        suspects = _without_whole_end(images, reasons, progress)
        make = _Decode(images=images)
        batches = []
        for start in range(0, len(suspects), _BATCH):
            indices = suspects[start : start + _BATCH]
            batches.append([(index, 0) for index in indices])
        what = f"decode {images.name} {images.split}"
        with progress(what, len(suspects), 0) as report:
            read = read_samples(images, make, batches, workers=workers, stopping=stopping)
            n_read = 0
            for keys, batch in zip(batches, read, strict=True):
                reasons.update(batch.unreadable)
                n_read += len(keys)
                report(n_read, "files with an unusual end")
    if isinstance(images, ObjectImages):
        for index, reason in images.unusable().items():
            reasons[images.source(index)] = reason
    return reasons


def _without_whole_end(
    images: FolderImages, missing: Reasons, progress: NamedProgress
) -> Sequence[int]:
    """Returns the images, of those that are there, whose file or mask does not end as it should."""
    if len(images) > _MOST_ENDS:
        return ()
    existing = [index for index, path in enumerate(images.paths) if path not in missing]
    files = [[images.paths[index] for index in existing]]
    if isinstance(images, ClassMapFolder):
        files.append([images.mask_paths[index] for index in existing])
    bar = functools.partial(progress, f"check {images.name} {images.split}")
    suspects = set()
    for paths in files:
        are_whole = in_threads(ends_whole, paths, bar, "ends of files")
        for index, is_whole in zip(existing, are_whole, strict=True):
            if not is_whole:
                suspects.add(index)
    return sorted(suspects)
