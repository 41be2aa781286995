"""Selection by coverage, and purity-coverage curves, beside plain twins."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relloc.studies.purity_coverage import purity_coverage, select_by_coverage

SETS = st.lists(
    st.lists(st.integers(0, 7), min_size=1, max_size=4, unique=True), min_size=1, max_size=12
)


def arrays(sets):
    return [np.array(images, dtype=np.int64) for images in sets]


def one_hot(labels, n_classes):
    return np.array(labels)[:, None] == np.arange(n_classes)


def plain_selection(sets, most):
    """Looks at all sets from the best on, each time that one was taken."""
    covered = dict.fromkeys(range(8), 0)
    taken = []
    times = 1
    while len(taken) < min(most, len(sets)):
        for number, images in enumerate(sets):
            if number not in taken and any(covered[image] < times for image in images):
                taken.append(number)
                for image in images:
                    covered[image] += 1
                break
        else:
            times += 1
    return taken


def plain_curve(sets, labels, order):
    points = []
    shares = []
    seen = set()
    for number in order:
        images = sets[number]
        classes = [labels[image] for image in images]
        shares.append(max(classes.count(label) for label in classes) / len(classes))
        seen |= set(images)
        points.append((len(seen) / len(labels), sum(shares) / len(shares)))
    return points


def plain_area(points, limit):
    area = 0.0
    before = 0.0
    for coverage, purity in points:
        area += (min(coverage, limit) - before) * purity
        before = min(coverage, limit)
    return area


def test_selection_by_hand():
    sets = [[0, 1], [0, 1], [1, 2], [0, 2], [3]]
    # Each image once: 2 and 3 are new in the third and the last set. Then twice, and so on.
    assert select_by_coverage(arrays(sets), 4, 10) == [0, 2, 4, 1, 3]
    assert select_by_coverage(arrays(sets), 4, 2) == [0, 2]
    assert select_by_coverage([], 4, 2) == []


@given(sets=SETS, most=st.integers(1, 14))
def test_selection_is_the_greedy_one(sets, most):
    assert select_by_coverage(arrays(sets), 8, most) == plain_selection(sets, most)


@given(sets=SETS, labels=st.lists(st.integers(0, 2), min_size=8, max_size=8))
def test_a_curve_is_that_of_a_plain_walk(sets, labels):
    curve = purity_coverage(arrays(sets), one_hot(labels, 3), purest_first=False)
    points = plain_curve(sets, labels, range(len(sets)))
    assert curve.order.tolist() == list(range(len(sets)))
    assert curve.coverage.tolist() == pytest.approx([coverage for coverage, _ in points])
    assert curve.purity.tolist() == pytest.approx([purity for _, purity in points])
    for limit in (0.5, 1.0):
        assert curve.area(limit) == pytest.approx(plain_area(points, limit))

    purest = purity_coverage(arrays(sets), one_hot(labels, 3), purest_first=True)
    assert (np.diff(purest.of_set) <= 0).all()
    order = sorted(range(len(sets)), key=lambda number: -curve.of_set[number])
    assert purest.order.tolist() == order
    points = plain_curve(sets, labels, order)
    assert purest.area() == pytest.approx(plain_area(points, 1.0))


def test_a_curve_by_hand():
    labels = [0, 0, 1, 1, 1, 0, 1, 0]
    sets = arrays([[0, 1, 2, 5], [2, 3, 4, 6]])
    curve = purity_coverage(sets, one_hot(labels, 2), purest_first=True)
    assert curve.order.tolist() == [1, 0]
    assert curve.of_set.tolist() == [1, 0.75]
    assert curve.coverage.tolist() == [0.5, 7 / 8]
    assert curve.purity.tolist() == [1, 7 / 8]
    assert curve.area() == pytest.approx(0.5 + 3 / 8 * 7 / 8)
    assert curve.area(0.5) == 0.5
    assert purity_coverage([], one_hot(labels, 2), purest_first=True).area() == 0


def test_images_of_several_classes_count_for_each_and_of_none_for_none():
    shows = np.array([[1, 1], [0, 1], [0, 0], [1, 1]], dtype=bool)
    curve = purity_coverage(arrays([[0, 1], [0, 2], [2]]), shows, purest_first=False)
    assert curve.of_set.tolist() == [1, 0.5, 0]
