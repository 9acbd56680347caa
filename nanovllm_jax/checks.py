"""How options are refused: with the option's name, what it must be, and the value that it has."""

import dataclasses
from typing import Any

# Declared type of a field -> the values that it takes, also in words. No number is a bool.
TYPES = {
    bool: (bool, "True or False"),
    int: (int, "an integer"),
    int | None: (int | None, "an integer"),
    float: (int | float, "a number"),
}


def check_types(options: Any) -> None:
    """Raise TypeError if a dataclass's field, declared with one of TYPES, has another value."""
    for field in dataclasses.fields(options):
        if field.type in TYPES:
            accepted, words = TYPES[field.type]
            value = getattr(options, field.name)
            wrong_bool = isinstance(value, bool) and accepted is not bool
            if wrong_bool or not isinstance(value, accepted):
                raise TypeError(f"{field.name} must be {words}, got {value!r}")


def check_values(options: Any, rules: dict[str, tuple[bool, str]]) -> None:
    """Raise ValueError for the first option whose rule, (whether it holds, its words), does not."""
    for name, (holds, words) in rules.items():
        if not holds:
            raise ValueError(f"{name} must be {words}, got {getattr(options, name)!r}")
