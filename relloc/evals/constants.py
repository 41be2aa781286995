"""What the constants of evaluations must be: each wrong one is told by its setting, its value and what is right."""

import math

from relloc.data.views import View


def check_whole(setting: str, value: object, at_least: int = 1) -> None:
    """Raises `ValueError` unless `value` is a whole number of `at_least` or more."""
    if not _is_whole(value, at_least):
        raise ValueError(f"{setting} is {value}: give a whole number of {at_least} or more")


def check_number(
    setting: str, value: object, *, above: float = -math.inf, at_least: float = -math.inf, at_most: float = math.inf
) -> None:
    """Raises `ValueError` unless `value` is a finite number within the limits."""
    if not _is_number(value, above, at_least, at_most):
        raise ValueError(f"{setting} is {value}: give a number{_limits(above, at_least, at_most)}")


def check_wholes(setting: str, values: object, at_least: int = 1, *, may_be_empty: bool = False) -> None:
    """Raises `ValueError` unless `values` is a list of whole numbers of `at_least` or more, by default not empty."""
    wanted = f"whole numbers of {at_least} or more"
    if not all(_is_whole(one, at_least) for one in _listed(setting, values, wanted, may_be_empty)):
        raise ValueError(f"{setting} is {values}: give {wanted}")


def check_numbers(
    setting: str,
    values: object,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    may_be_empty: bool = False,
) -> None:
    """Raises `ValueError` unless `values` is a list of finite numbers within the limits, by default not empty."""
    wanted = f"numbers{_limits(above, at_least, at_most)}"
    if not all(_is_number(one, above, at_least, at_most) for one in _listed(setting, values, wanted, may_be_empty)):
        raise ValueError(f"{setting} is {values}: give {wanted}")


def check_view(setting: str, view: object) -> None:
    """Raises `ValueError` unless `view` can be taken of an image."""
    if not isinstance(view, View):
        raise ValueError(f"{setting} is {view}: an evaluation sees images in a view, such as relloc.data.views.Center")


def _listed(setting: str, values: object, wanted: str, may_be_empty: bool) -> list[object] | tuple[object, ...]:
    if isinstance(values, int | float) and not isinstance(values, bool):
        raise ValueError(f"{setting} is {values}: give a list, [{values}]")
    if not isinstance(values, list | tuple) or not (values or may_be_empty):
        raise ValueError(f"{setting} is {values}: give a list of {wanted}")
    return values


def _is_whole(value: object, at_least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def _is_number(value: object, above: float, at_least: float, at_most: float) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return False
    return above < value and at_least <= value <= at_most


def _limits(above: float, at_least: float, at_most: float) -> str:
    named = ((f"above {above:g}", above), (f"of {at_least:g} or more", at_least), (f"of {at_most:g} or less", at_most))
    limits = " and ".join(words for words, limit in named if math.isfinite(limit))
    return f" {limits}" if limits else ""
