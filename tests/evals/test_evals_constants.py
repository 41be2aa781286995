import math
import re

import pytest

from relloc.data.views import RandomCrop
from relloc.evals.constants import check_number, check_numbers, check_view, check_whole, check_wholes


def refused(message: str):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def test_what_is_right_is_passed_over() -> None:
    check_whole("batch", 1)
    check_whole("seed", 0, at_least=0)
    check_number("lr", 30, above=0)
    check_number("momentum", 0.0, at_least=0, at_most=1)
    check_wholes("k", [10, 20])
    check_wholes("k", (10, 20))
    check_wholes("milestone_epochs", [], may_be_empty=True)
    check_numbers("rates", (0.1, 1), above=0)
    check_numbers("grid", [], may_be_empty=True)


@pytest.mark.parametrize("value", [0, -1, 1.0, 1.5, True, "7", None, [3], math.nan])
def test_what_is_no_whole_number_is_told(value: object) -> None:
    with refused(f"eval.knn.batch is {value}: give a whole number of 1 or more"):
        check_whole("eval.knn.batch", value)


@pytest.mark.parametrize("value", [0, -0.5, "abc", None, False, math.nan, math.inf, [0.1]])
def test_what_is_no_number_or_beyond_a_limit_is_told(value: object) -> None:
    with refused(f"eval.knn.temperature is {value}: give a number above 0"):
        check_number("eval.knn.temperature", value, above=0)


@pytest.mark.parametrize("value", [None, "abc", {"short_px": 256}, 224])
def test_what_is_no_view_is_told(value: object) -> None:
    check_view("eval.linear.augment", RandomCrop(short_px=8, crop_px=8))
    with pytest.raises(ValueError, match=f"^eval.linear.augment is {re.escape(str(value))}: an evaluation sees"):
        check_view("eval.linear.augment", value)


def test_every_limit_is_named() -> None:
    with refused("share is 1.5: give a number above 0 and of 1 or less"):
        check_number("share", 1.5, above=0, at_most=1)
    with refused("decay is -1: give a number of 0 or more"):
        check_number("decay", -1, at_least=0)
    with refused("decays is [0.1, -1]: give numbers of 0 or more"):
        check_numbers("decays", [0.1, -1], at_least=0)
    with refused("rates is ['a']: give numbers"):
        check_numbers("rates", ["a"])


def test_a_single_number_where_a_list_belongs_is_answered_with_the_list() -> None:
    with refused("eval.knn.k is 5: give a list, [5]"):
        check_wholes("eval.knn.k", 5)
    with refused("rates is 0.1: give a list, [0.1]"):
        check_numbers("rates", 0.1)


@pytest.mark.parametrize("values", [[], (), "10", None, {"a": 1}, True])
def test_what_is_no_list_with_something_in_it_is_told(values: object) -> None:
    with refused(f"eval.knn.k is {values}: give a list of whole numbers of 1 or more"):
        check_wholes("eval.knn.k", values)
    with refused(f"rates is {values}: give a list of numbers above 0"):
        check_numbers("rates", values, above=0)


@pytest.mark.parametrize("values", [[1.5], [10, 0], [10, "20"], [True], [[10]], (None,)])
def test_one_wrong_member_is_told_with_all(values: object) -> None:
    with refused(f"eval.knn.k is {values}: give whole numbers of 1 or more"):
        check_wholes("eval.knn.k", values)
