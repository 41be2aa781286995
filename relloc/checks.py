"""Checks of settings, so that the same mistake has the same message everywhere.

Each function returns a value that is right, and otherwise raises `UsageError` with the setting's
name, its value and what to give instead. Every class and function that a user's settings reach uses
them.
"""

import math
import sys
from collections.abc import Callable, Collection, Iterable
from typing import Any

from relloc.errors import UsageError

# Limits where none is given. The upper one leaves out infinity.
_LOWEST = -math.inf
_HIGHEST = sys.float_info.max


def whole(setting: str, value: Any, at_least: float = 1) -> int:
    """Checks that a value is a whole number of `at_least` or more.

    Example:
        >>> whole("grid.patch_px", 0)
        UsageError: grid.patch_px is 0: give a whole number of 1 or more
    """
    if not _is_whole(value, at_least):
        raise _wrong(setting, value, f"a whole number{_limits_text(at_least=at_least)}")
    return value


def multiple(setting: str, value: int, of: int) -> int:
    """Checks that a whole number is a multiple of another one."""
    if value % of:
        raise _wrong(setting, value, f"a multiple of {of}")
    return value


def number(
    setting: str,
    value: Any,
    *,
    above: float = _LOWEST,
    at_least: float = _LOWEST,
    at_most: float = _HIGHEST,
) -> float:
    """Checks that a value is a number within the limits; infinity is one if `at_most` is."""
    if not _is_number(value, above, at_least, at_most):
        raise _wrong(setting, value, f"a number{_limits_text(above, at_least, at_most)}")
    return value


def true_or_false(setting: str, value: Any) -> bool:
    """Checks that a value is True or False; 0 and 1 are neither."""
    if not isinstance(value, bool):
        raise _wrong(setting, value, "true or false")
    return value


def one_of(setting: str, value: Any, choices: Collection[Any]) -> Any:
    """Checks that a value is one of the choices."""
    if value not in choices:
        raise _wrong(setting, value, f"one of {_listed(choices)}")
    return value


def some_of(setting: str, values: Any, choices: Collection[Any]) -> Any:
    """Checks that a value is a list, not empty, of some of the choices."""
    # A string is refused too, although its letters could be looked up among the choices.
    is_list = isinstance(values, list | tuple)
    if not is_list or not values or not all(value in choices for value in values):
        raise _wrong(setting, values, f"a list of some of {_listed(choices)}")
    return values


def wholes(
    setting: str,
    values: Any,
    at_least: float = 1,
    *,
    may_be_empty: bool = False,
) -> Any:
    """Checks that a value is a list of whole numbers of `at_least` or more."""
    wanted = f"whole numbers{_limits_text(at_least=at_least)}"

    def is_right(value: Any) -> bool:
        return _is_whole(value, at_least)

    return _list_of(wanted, is_right, setting, values, may_be_empty)


def numbers(
    setting: str,
    values: Any,
    *,
    above: float = _LOWEST,
    at_least: float = _LOWEST,
    at_most: float = _HIGHEST,
    may_be_empty: bool = False,
) -> Any:
    """Checks that a value is a list of numbers within the limits."""
    wanted = f"numbers{_limits_text(above, at_least, at_most)}"

    def is_right(value: Any) -> bool:
        return _is_number(value, above, at_least, at_most)

    return _list_of(wanted, is_right, setting, values, may_be_empty)


def increasing(setting: str, values: Iterable[float]) -> None:
    """Checks that each number of a list, such as an epoch, is larger than the one before."""
    values = list(values)
    sorted_without_repeats = sorted(set(values))
    if values != sorted_without_repeats:
        raise _wrong(setting, values, "numbers in increasing order")


def _list_of(
    wanted: str,
    is_right: Callable[[Any], bool],
    setting: str,
    values: Any,
    may_be_empty: bool,
) -> Any:
    # The usual slip is a single number without brackets: the message shows the list to write.
    is_bool = isinstance(values, bool)
    if isinstance(values, int | float) and not is_bool:
        raise _wrong(setting, values, f"a list, [{values}]")
    if not isinstance(values, list | tuple):
        raise _wrong(setting, values, f"a list of {wanted}")
    if not values and not may_be_empty:
        raise _wrong(setting, values, f"a list of {wanted}")
    if not all(map(is_right, values)):
        raise _wrong(setting, values, wanted)
    return values


def _wrong(setting: str, value: Any, wanted: str) -> UsageError:
    return UsageError(f"{setting} is {value}: give {wanted}")


def _is_whole(value: Any, at_least: float) -> bool:
    # Python counts True and False as whole numbers; a user who writes true means something else.
    if isinstance(value, bool):
        return False
    return isinstance(value, int) and value >= at_least


def _is_number(value: Any, above: float, at_least: float, at_most: float) -> bool:
    if isinstance(value, bool):
        return False
    if not isinstance(value, int | float):
        return False
    # Written so that nan, for which every comparison is false, is refused.
    return above < value and at_least <= value <= at_most


def _limits_text(
    above: float = _LOWEST,
    at_least: float = _LOWEST,
    at_most: float = _HIGHEST,
) -> str:
    """Returns the limits in words, such as " above 0 and of 1 or less"; empty without limits."""
    # The common case of a range reads better as one.
    if at_least > _LOWEST and at_most < _HIGHEST:
        return f" from {at_least:g} to {at_most:g}"
    limits = []
    if above > _LOWEST:
        limits.append(f"above {above:g}")
    if at_least > _LOWEST:
        limits.append(f"of {at_least:g} or more")
    if at_most < _HIGHEST:
        limits.append(f"of {at_most:g} or less")
    if not limits:
        return ""
    return " " + " and ".join(limits)


def _listed(choices: Collection[Any]) -> str:
    return ", ".join(map(str, choices))
