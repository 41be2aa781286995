import contextlib
import math
from collections.abc import Iterator

import pytest

from relloc import checks
from relloc.errors import UsageError


@contextlib.contextmanager
def refused(*words: str) -> Iterator[None]:
    """Expects a `UsageError` whose message begins with the first word and has all the others."""
    with pytest.raises(UsageError) as raised:
        yield
    message = str(raised.value)
    assert message.startswith(words[0])
    assert [word for word in words if word not in message] == []


def test_what_is_right_is_passed_over() -> None:
    checks.whole("batch", 1)
    checks.whole("seed", 0, at_least=0)
    checks.number("lr", 30, above=0)
    checks.number("momentum", 0.0, at_least=0, at_most=1)
    checks.wholes("k", [10, 20])
    checks.wholes("k", (10, 20))
    checks.wholes("milestone_epochs", [], may_be_empty=True)
    checks.numbers("rates", (0.1, 1), above=0)
    checks.numbers("grid", [], may_be_empty=True)


@pytest.mark.parametrize("value", [0, -1, 1.0, 1.5, True, "7", None, [3], math.nan])
def test_what_is_no_whole_number_is_refused(value: object) -> None:
    with refused(f"eval.knn.batch is {value}: ", "whole number", "1 or more"):
        checks.whole("eval.knn.batch", value)


@pytest.mark.parametrize("value", [0, -0.5, "abc", None, False, math.nan, math.inf, [0.1]])
def test_what_is_no_number_or_beyond_a_limit_is_refused(value: object) -> None:
    with refused(f"eval.knn.temperature is {value}: ", "number", "above 0"):
        checks.number("eval.knn.temperature", value, above=0)


def test_every_limit_is_named() -> None:
    with refused("share is 1.5: ", "number", "above 0", "1 or less"):
        checks.number("share", 1.5, above=0, at_most=1)
    with refused("decay is -1: ", "number", "0 or more"):
        checks.number("decay", -1, at_least=0)
    with refused("decays is [0.1, -1]: ", "numbers", "0 or more"):
        checks.numbers("decays", [0.1, -1], at_least=0)
    with refused("rates is ['a']: ", "numbers"):
        checks.numbers("rates", ["a"])


def test_a_single_number_where_a_list_belongs_is_answered_with_the_list() -> None:
    with refused("eval.knn.k is 5: ", "list", "[5]"):
        checks.wholes("eval.knn.k", 5)
    with refused("rates is 0.1: ", "list", "[0.1]"):
        checks.numbers("rates", 0.1)


@pytest.mark.parametrize("values", [[], (), "10", None, {"a": 1}, True])
def test_what_is_no_list_with_something_in_it_is_refused(values: object) -> None:
    with refused(f"eval.knn.k is {values}: ", "list", "whole numbers", "1 or more"):
        checks.wholes("eval.knn.k", values)
    with refused(f"rates is {values}: ", "list", "numbers", "above 0"):
        checks.numbers("rates", values, above=0)


@pytest.mark.parametrize("values", [[1.5], [10, 0], [10, "20"], [True], [[10]], (None,)])
def test_one_wrong_member_is_shown_with_all(values: object) -> None:
    with refused(f"eval.knn.k is {values}: ", "whole numbers", "1 or more"):
        checks.wholes("eval.knn.k", values)


def test_infinity_is_a_number_only_where_it_is_allowed() -> None:
    assert checks.number("save_every_s", math.inf, at_least=0, at_most=math.inf) == math.inf
    with refused("lr is inf: ", "number"):
        checks.number("lr", math.inf)


@pytest.mark.parametrize("value", [0, 1, "true", None])
def test_only_truth_values_are_true_or_false(value: object) -> None:
    assert checks.true_or_false("deterministic", False) is False
    with refused(f"deterministic is {value}: ", "true or false"):
        checks.true_or_false("deterministic", value)


def test_choices_are_named() -> None:
    assert checks.one_of("precision", "bf16", ("bf16", "fp32")) == "bf16"
    assert checks.some_of("batch_norm", ["bf16"], ("bf16", "fp32")) == ["bf16"]
    with refused("precision is fp8: ", "one of", "bf16, fp32"):
        checks.one_of("precision", "fp8", ("bf16", "fp32"))
    for wrong in ("bf16", [], ["fp8"], ["bf16", None]):
        with refused(f"layers is {wrong}: ", "list", "bf16, fp32"):
            checks.some_of("layers", wrong, ("bf16", "fp32"))


def test_numbers_rise() -> None:
    checks.increasing("milestone_epochs", [1, 2, 5])
    for wrong in ([2, 1], [1, 1]):
        with refused(f"milestone_epochs is {wrong}: ", "increasing"):
            checks.increasing("milestone_epochs", wrong)
