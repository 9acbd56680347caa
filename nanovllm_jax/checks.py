"""Refuses options with a message that has the option's name, what it must be, and its value."""

import dataclasses
from collections.abc import Mapping
from typing import Any

# Maps the declared type of a field to the values that it takes, also in words. No number is a bool.
TYPES = {
    bool: (bool, "True or False"),
    int: (int, "an integer"),
    int | None: (int | None, "an integer"),
    float: (int | float, "a number"),
}


def check_types(declared: Any, values: Mapping[str, Any]) -> None:
    """Raise TypeError if a value does not fit the field of its name.

    Args:
        declared: a dataclass; its fields of other types than TYPES are not checked.
        values: by the field's name.
    """
    for field in dataclasses.fields(declared):
        if field.type in TYPES and field.name in values:
            accepted, words = TYPES[field.type]
            value = values[field.name]
            wrong_bool = isinstance(value, bool) and accepted is not bool
            if wrong_bool or not isinstance(value, accepted):
                raise TypeError(f"{field.name} must be {words}, got {value!r}")


def check_values(options: Any, requirements: Mapping[str, tuple[bool, str]]) -> None:
    """Raise ValueError for the first attribute of `options` that is not as it must be.

    Args:
        requirements: by the attribute's name, whether it holds, and the requirement in words.
    """
    for name, (holds, words) in requirements.items():
        if not holds:
            raise ValueError(f"{name} must be {words}, got {getattr(options, name)!r}")
