"""PASCAL VOC with boxes and the proposals of selective search, as Fast R-CNN is trained on it.

The proposals are files of the project fast-rcnn (its archive selective_search_data.tgz), one for
each list of images, such as voc_2007_trainval.mat: `boxes` is a cell array with a matrix for each
image, in the order of the list. Columns are y1, x1, y2, x2, counted from 1, and a box has the
pixels of its corners in it (docs/protocols.md 3.16).
"""

import dataclasses
import hashlib
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64

from relloc import checks
from relloc.data.annotated_folders import ObjectFolder
from relloc.data.image_set import Splits, warn_of_other_counts
from relloc.data.lists import COUNTED_YEAR
from relloc.data.processes import Progress
from relloc.data.voc_objects import voc_detection
from relloc.errors import DataError, MissingData, reason

# The folder in fast-rcnn's archive.
_UNPACKED = "selective_search_data"
# From y1, x1, y2, x2 to x1, y1, x2, y2.
_COLUMNS = [1, 0, 3, 2]
_HOLDING = (
    "a folder with the proposals of selective search, voc_YEAR_LIST.mat, from fast-rcnn's archive "
    "selective_search_data.tgz"
)
_VARIABLE = "RELLOC_VOC_PROPOSALS"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ProposalTable:
    """The proposals of a split: those of image `i` are the rows `starts[i] : starts[i + 1]`.

    `boxes` are x1, y1, x2, y2 in pixels of the image, counted from 0, corners included.
    """

    boxes: Float32[np.ndarray, "proposals 4"]
    starts: Int64[np.ndarray, "image_bounds"]

    def of_image(self, index: int) -> Float32[np.ndarray, "n 4"]:
        """Returns the proposals of an image, in the order of the file."""
        return self.boxes[self.starts[index] : self.starts[index + 1]]

    def hash(self) -> str:
        """Returns a hash of all proposals."""
        hasher = hashlib.sha256(b"proposals of images\0")
        for array in (self.boxes, self.starts):
            # The shape comes first, so that two different tables never have the same bytes.
            hasher.update(f"{array.shape}\0".encode())
            hasher.update(np.ascontiguousarray(array).data)
        return hasher.hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProposalFolder(ObjectFolder):
    """The images of one split as files, with objects and proposals: `ProposedImages`."""

    proposal_table: ProposalTable = dataclasses.field(repr=False, compare=False)

    def proposals(self, index: int) -> Float32[np.ndarray, "n 4"]:
        return self.proposal_table.of_image(index)

    def other_content(self, progress: Progress) -> Iterator[str]:
        yield from super().other_content(progress)
        yield self.proposal_table.hash()


def voc_with_proposals(
    *,
    root: str | None,
    proposals: str | None,
    year: int,
    train: str,
    held_out: str,
    published_images: Mapping[str, int] | None = None,
) -> Splits:
    """Returns the images of one year of PASCAL VOC with their objects and proposals.

    Objects are read as fast-rcnn reads them: 1 is subtracted from all coordinates. `proposals` is
    the folder of the .mat files, or the folder above, in which their archive was unpacked. `train`
    and `held_out` are names of lists of images.

    Raises:
        MissingData: nothing says where images or proposals are.
        DataError: something of them is missing or wrong.

    Example:
        >>> voc_with_proposals(
        ...     root="/data",
        ...     proposals="/data/selective_search_data",
        ...     year=2007,
        ...     train="trainval",
        ...     held_out="test",
        ... )
    """
    checks.whole("data.source.year", year)
    try:
        with_objects = voc_detection(
            root=root,
            years=[year],
            train=train,
            held_out=held_out,
            held_out_year=year,
            reference="mmdet",
        )
    except MissingData as error:
        # Who has to unpack the one is told of the other, too.
        holding = f"{error.holding}; and in {_VARIABLE} {_HOLDING}"
        raise MissingData(str(error), holding=holding) from error
    splits = []
    for images in (with_objects.train, with_objects.held_out):
        if not isinstance(images, ObjectFolder):
            raise TypeError(f"{images.name} {images.split} are no files with objects")
        path = proposal_file(proposals, year, images.split)
        table = read_proposals(path, images)
        splits.append(_with_table(images, table))
    train_images, held_out_images = splits
    counts = published_images if year == COUNTED_YEAR else None
    found = Splits(
        train=train_images,
        held_out=held_out_images,
        remarks=with_objects.remarks,
        published_images=counts or {},
    )
    warn_of_other_counts(found)
    return found


def proposal_file(folder: str | None, year: int, split: str) -> Path:
    """Returns the file with the proposals of a list of images.

    Raises:
        MissingData: `folder` is not given.
        DataError: there is no such file.
    """
    if not folder:
        raise MissingData(
            f"data.proposals is not set: give data.proposals=FOLDER, or set the environment "
            f"variable {_VARIABLE}, to {_HOLDING}",
            holding=_HOLDING,
        )
    name = f"voc_{year}_{split}.mat"
    candidates = (Path(folder) / name, Path(folder) / _UNPACKED / name)
    for path in candidates:
        if path.is_file():
            return path
    raise DataError(f"{candidates[0]} is missing: data.proposals={folder} is to be {_HOLDING}")


def read_proposals(path: Path, images: ObjectFolder) -> ProposalTable:
    """Returns the proposals in a file, which have to be those of `images` in their order.

    Raises:
        DataError: the file can't be read or holds something else, has proposals for another number
            of images, or a box that lies outside of its image.
    """
    matrices = _cells(path)
    if len(matrices) != len(images):
        raise DataError(
            f"{path} has proposals for {len(matrices):,} images, and {images.name} {images.split} "
            f"has {len(images):,} images: give the file that was made for this list"
        )
    boxes = []
    counts = []
    for index, matrix in enumerate(matrices):
        own_boxes = _boxes(path, images.source(index), matrix)
        # An annotation that can't be used does not say how large its image is.
        if index not in images.unusable():
            _check_inside(path, images.source(index), own_boxes, images.size(index))
        boxes.append(own_boxes)
        counts.append(len(own_boxes))
    return ProposalTable(
        boxes=np.concatenate([np.zeros((0, 4), np.float32), *boxes]),
        starts=np.cumsum([0, *counts], dtype=np.int64),
    )


def _with_table(images: ObjectFolder, table: ProposalTable) -> ProposalFolder:
    return ProposalFolder(
        name=images.name,
        split=images.split,
        paths=images.paths,
        classes=images.classes,
        table=images.table,
        reading=images.reading,
        proposal_table=table,
    )


def _cells(path: Path) -> list[np.ndarray]:
    """Returns the matrices in the cell array `boxes` of a file. Raises `DataError`."""
    # Imported here, since most runs read no such file.
    from scipy.io import loadmat, whosmat
    from scipy.io.matlab import MatReadError

    advice = "Unpack selective_search_data.tgz again"
    try:
        names = [name for name, _, _ in whosmat(path)]
        content = loadmat(path, variable_names=["boxes"])
    # What scipy raises for version 7.3, which is HDF5.
    except NotImplementedError as error:
        raise DataError(
            f"{path} is a file of MATLAB's version 7.3, which can't be read: save it with "
            "save(…, '-v7')"
        ) from error
    # A file that is damaged may fail in any of scipy's steps.
    except (
        OSError,
        EOFError,
        ValueError,
        TypeError,
        LookupError,
        struct.error,
        zlib.error,
        MatReadError,
    ) as error:
        raise DataError(f"{path} can't be read: {reason(error)}. {advice}") from error
    boxes = content.get("boxes")
    if boxes is None:
        found = ", ".join(names) or "nothing"
        raise DataError(f"{path} has no variable boxes, but {found}. {advice}")
    if boxes.dtype != object or boxes.size != max(boxes.shape, default=0):
        raise DataError(
            f"{path}: boxes is an array of {boxes.dtype} of the shape {boxes.shape}, and should be "
            f"a row of cells with a matrix for each image. {advice}"
        )
    return list(boxes.ravel())


def _boxes(path: Path, image: str, matrix: np.ndarray) -> Float32[np.ndarray, "n 4"]:
    """Returns the proposals of an image as x1, y1, x2, y2, counted from 0. Raises `DataError`."""
    is_numeric = isinstance(matrix, np.ndarray) and matrix.dtype.kind in "iuf"
    # MATLAB's empty matrix has no columns.
    if is_numeric and not matrix.size:
        return np.zeros((0, 4), np.float32)
    if not is_numeric or matrix.ndim != 2 or matrix.shape[1] != len(_COLUMNS):
        kind = getattr(matrix, "dtype", type(matrix).__name__)
        raise DataError(
            f"{path}: the proposals of {image} are {kind} of the shape "
            f"{getattr(matrix, 'shape', ())}, and should be numbers with a row y1, x1, y2, x2 for "
            "each proposal"
        )
    # Single precision holds whole numbers up to 2^24.
    in_order = matrix[:, _COLUMNS].astype(np.float32)
    return in_order - 1


def _check_inside(
    path: Path, image: str, boxes: Float32[np.ndarray, "n 4"], size: tuple[int, int]
) -> None:
    """Checks that boxes are not empty and lie in their image. Raises `DataError`."""
    height, width = size
    left, top, right, bottom = boxes.T
    is_in_image = (left >= 0) & (top >= 0) & (right < width) & (bottom < height)
    has_pixels = (left <= right) & (top <= bottom)
    # What is not a number is neither.
    wrong = np.flatnonzero(~(is_in_image & has_pixels))
    if len(wrong):
        row = int(wrong[0])
        x1, y1, x2, y2 = (boxes[row] + 1).tolist()
        raise DataError(
            f"{path}: proposal {row + 1} of {image} is y1, x1, y2, x2 = {y1:g}, {x1:g}, {y2:g}, "
            f"{x2:g}, and the image has {width} x {height} px ({len(wrong)} of its {len(boxes)} "
            "proposals are wrong): the file may have been made for another list of images"
        )
