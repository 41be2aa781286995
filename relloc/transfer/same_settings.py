"""Whether two objects that are made of settings are equal."""

import dataclasses
from typing import Any


def same_settings(one: Any, other: Any) -> bool:
    """Returns whether two values are equal; of dataclasses, all fields and the class are compared.

    A list equals a tuple of the same values: settings come as lists, and constants are tuples.

    Example:
        >>> same_settings(RandomSizes(short_px=[480], long_px=800), published)
    """
    if dataclasses.is_dataclass(one):
        if type(one) is not type(other):
            return False
        for field in dataclasses.fields(one):
            own_value = getattr(one, field.name)
            other_value = getattr(other, field.name)
            if not same_settings(own_value, other_value):
                return False
        return True
    if isinstance(one, list | tuple):
        if not isinstance(other, list | tuple) or len(one) != len(other):
            return False
        pairs = zip(one, other, strict=True)
        return all(same_settings(own_value, other_value) for own_value, other_value in pairs)
    return one == other
