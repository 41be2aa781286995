import numpy as np
import pytest
from jaxtyping import Float

from relloc.transfer.metrics.box_confusion import BoxesOfImage, box_confusion

LEFT, RIGHT = (0, 0, 20, 20), (50, 0, 70, 20)


def image(
    found: list[tuple[tuple[float, ...], int, float]],
    true: list[tuple[tuple[float, ...], int]],
    difficult: tuple[bool, ...] | None = None,
    crowd: tuple[bool, ...] | None = None,
) -> BoxesOfImage:
    def boxes(rows: list) -> Float[np.ndarray, "n 4"]:
        return np.array([row[0] for row in rows], dtype=np.float32).reshape(-1, 4)

    return BoxesOfImage(
        found_boxes=boxes(found),
        found_classes=np.array([row[1] for row in found], dtype=np.int64),
        found_scores=np.array([row[2] for row in found], dtype=np.float32),
        true_boxes=boxes(true),
        true_classes=np.array([row[1] for row in true], dtype=np.int64),
        difficult=np.array(difficult or [False] * len(true), dtype=bool),
        crowd=np.array(crowd or [False] * len(true), dtype=bool),
    )


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([(LEFT, 0, 0.9), (RIGHT, 1, 0.9)], [[1, 0, 0], [0, 1, 0], [0, 0, 0]]),
        ([(LEFT, 1, 0.9)], [[0, 1, 0], [0, 0, 1], [0, 0, 0]]),  # another class, and one missed
        ([], [[0, 0, 1], [0, 0, 1], [0, 0, 0]]),
        # The surer one takes the box, the other one finds nothing.
        ([(LEFT, 0, 0.5), (LEFT, 1, 0.9)], [[0, 1, 0], [0, 0, 1], [1, 0, 0]]),
        ([(LEFT, 0, 0.2), (RIGHT, 1, 0.9)], [[0, 0, 1], [0, 1, 0], [0, 0, 0]]),  # not shown
        ([((0, 0, 20, 9), 0, 0.9)], [[0, 0, 1], [0, 0, 1], [1, 0, 0]]),  # too little overlap
    ],
)
def test_true_and_found_classes(
    found: list[tuple[tuple[float, ...], int, float]], expected: list[list[int]]
) -> None:
    one = image(found, [(LEFT, 0), (RIGHT, 1)])
    assert box_confusion([one], n_classes=2).tolist() == expected
    twice = box_confusion([one, one], n_classes=2).tolist()
    assert twice == [[2 * count for count in row] for row in expected]


def test_a_difficult_box_is_not_missed() -> None:
    true = [(LEFT, 0), (RIGHT, 1)]
    nothing = image([], true, (True, False))
    assert box_confusion([nothing], n_classes=2).tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 0]]
    found = image([(LEFT, 0, 0.9)], true, (True, False))
    assert box_confusion([found], n_classes=2).tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0]]


def test_an_image_without_objects_counts_what_is_found() -> None:
    found = image([(LEFT, 1, 0.9), (RIGHT, 1, 0.9)], [])
    assert box_confusion([found], n_classes=2).tolist() == [[0, 0, 0], [0, 0, 0], [0, 2, 0]]


def test_a_crowd_is_no_box_and_excuses_what_lies_in_it() -> None:
    crowd = (0, 0, 400, 400)
    true = [(crowd, 0), (RIGHT, 1)]
    is_crowd = (True, False)
    # Nothing has to find the crowd.
    nothing = image([], true, crowd=is_crowd)
    assert box_confusion([nothing], n_classes=2).tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 0]]
    # Half of a detection of its class is enough; another class, or too little of it, finds nothing.
    halfway, hardly = (390, 0, 410, 20), (395, 0, 415, 20)
    found = image([(LEFT, 0, 0.9), (halfway, 0, 0.9), (hardly, 0, 0.9), (LEFT, 1, 0.9)], true,
                  crowd=is_crowd)  # fmt: skip
    assert box_confusion([found], n_classes=2).tolist() == [[0, 0, 0], [0, 0, 1], [1, 1, 0]]
    # A box within the crowd is taken all the same.
    taken = image([(RIGHT, 0, 0.9)], true, crowd=is_crowd)
    assert box_confusion([taken], n_classes=2).tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 0]]
