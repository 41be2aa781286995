"""Checks of settings: each raises `UsageError` with the setting's name, its value and what is right, or returns it.

Used by every class and function that a user's settings reach, so that the same mistake has the same message.
"""

import math
import sys
from collections.abc import Callable, Collection, Iterable
from typing import Any

from relloc.errors import UsageError

_FINITE = sys.float_info.max


def whole(setting: str, value: Any, at_least: float = 1) -> int:
    """A whole number of `at_least` or more."""
    if not _is_whole(value, at_least):
        raise _wrong(setting, value, f"a whole number{_limits(at_least=at_least)}")
    return value


def number(
    setting: str, value: Any, *, above: float = -math.inf, at_least: float = -math.inf, at_most: float = _FINITE
) -> float:
    """A number within the limits; infinity only where `at_most` is infinite."""
    if not _is_number(value, above, at_least, at_most):
        raise _wrong(setting, value, f"a number{_limits(above, at_least, at_most)}")
    return value


def true_or_false(setting: str, value: Any) -> bool:
    """A truth value, and no number that Python would take for one."""
    if not isinstance(value, bool):
        raise _wrong(setting, value, "true or false")
    return value


def one_of(setting: str, value: Any, choices: Collection[Any]) -> Any:
    """One of the choices."""
    if value not in choices:
        raise _wrong(setting, value, f"one of {_listed(choices)}")
    return value


def some_of(setting: str, values: Any, choices: Collection[Any]) -> Any:
    """A list, not empty, of some of the choices."""
    if not isinstance(values, list | tuple) or not values or any(value not in choices for value in values):
        raise _wrong(setting, values, f"a list of some of {_listed(choices)}")
    return values


def wholes(setting: str, values: Any, at_least: float = 1, *, may_be_empty: bool = False) -> Any:
    """A list of whole numbers of `at_least` or more."""
    wanted = f"whole numbers{_limits(at_least=at_least)}"
    return _list_of(wanted, lambda value: _is_whole(value, at_least), setting, values, may_be_empty)


def numbers(
    setting: str,
    values: Any,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    at_most: float = _FINITE,
    may_be_empty: bool = False,
) -> Any:
    """A list of numbers within the limits."""
    wanted = f"numbers{_limits(above, at_least, at_most)}"
    return _list_of(wanted, lambda value: _is_number(value, above, at_least, at_most), setting, values, may_be_empty)


def rising(setting: str, values: Iterable[float]) -> None:
    """Epochs of which each is later than the one before."""
    values = list(values)
    if values != sorted(set(values)):
        raise _wrong(setting, values, "epochs that rise")


def _list_of(wanted: str, is_right: Callable[[Any], bool], setting: str, values: Any, may_be_empty: bool) -> Any:
    # The usual slip is the number alone, which is answered with the list to write.
    if isinstance(values, int | float) and not isinstance(values, bool):
        raise _wrong(setting, values, f"a list, [{values}]")
    if not isinstance(values, list | tuple) or not (values or may_be_empty):
        raise _wrong(setting, values, f"a list of {wanted}")
    if not all(map(is_right, values)):
        raise _wrong(setting, values, wanted)
    return values


def _wrong(setting: str, value: Any, wanted: str) -> UsageError:
    return UsageError(f"{setting} is {value}: give {wanted}")


def _is_whole(value: Any, at_least: float) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def _is_number(value: Any, above: float, at_least: float, at_most: float) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return above < value and at_least <= value <= at_most  # never true of nan


def _limits(above: float = -math.inf, at_least: float = -math.inf, at_most: float = _FINITE) -> str:
    if at_least > -math.inf and at_most < _FINITE:
        return f" from {at_least:g} to {at_most:g}"
    limits = []
    if above > -math.inf:
        limits.append(f"above {above:g}")
    if at_least > -math.inf:
        limits.append(f"of {at_least:g} or more")
    if at_most < _FINITE:
        limits.append(f"of {at_most:g} or less")
    return f" {' and '.join(limits)}" if limits else ""


def _listed(choices: Collection[Any]) -> str:
    return ", ".join(map(str, choices))
