"""Refuses options with a message that has the option's name, what it must be, and its value."""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

Declared = TypeVar("Declared", bound=type)

# Maps the declared type of a field to the values that it takes, also in words. No number is a bool.
TYPES = {
    bool: (bool, "True or False"),
    int: (int, "an integer"),
    int | None: (int | None, "an integer or None"),
    float: (int | float, "a number"),
    str: (str, "a string"),
    str | None: (str | None, "a string or None"),
}


def plain(value: Any) -> Any:
    """Return a number of NumPy as Python's own, and anything else as it is."""
    # NumPy is not imported for it: the command line's --help would wait.
    of_numpy = type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0
    return value.item() if of_numpy else value


def is_integer(value: Any) -> bool:
    """Whether a value is a whole number, of Python or NumPy."""
    value = plain(value)
    return isinstance(value, int) and not isinstance(value, bool)


def check_types(declared: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values, with Python's own numbers in place of NumPy's.

    Args:
        declared: a dataclass; its fields of other types than TYPES are not checked.
        values: by the field's name.

    Raises:
        TypeError: a value does not fit the field of its name.
    """
    taken = {name: plain(value) for name, value in values.items()}
    for field in dataclasses.fields(declared):
        if field.type in TYPES and field.name in taken:
            accepted, words = TYPES[field.type]
            value = taken[field.name]
            wrong_bool = isinstance(value, bool) and accepted is not bool
            if wrong_bool or not isinstance(value, accepted):
                raise TypeError(f"{field.name} must be {words}, got {values[field.name]!r}")
    return taken


def check_values(options: Any, requirements: Mapping[str, tuple[bool, str]]) -> None:
    """Raise ValueError for the first attribute of `options` that is not as it must be.

    Args:
        requirements: by the attribute's name, whether it holds, and the requirement in words.
    """
    for name, (holds, words) in requirements.items():
        if not holds:
            raise ValueError(f"{name} must be {words}, got {getattr(options, name)!r}")


def check_names(
    owner: str, given: Iterable[str], valid: Collection[str], of_vllm: Mapping[str, str]
) -> None:
    """Raise TypeError for the first name that is not valid, with what to write in its place.

    Args:
        owner: what is being called.
        of_vllm: for reasons why this engine lacks options, the names that vLLM has for them.
    """
    for name in given:
        if name in valid:
            continue
        for reason, names in of_vllm.items():
            if name in names.split():
                raise TypeError(f"{owner} has no option {name!r}, which vLLM has: {reason}")
        raise TypeError(f"{owner} has no option {name!r}{alternatives(name, valid)}")


def alternatives(name: Any, valid: Collection[str]) -> str:
    """The end of a sentence that refuses a name: the nearest valid one, if one is near, and all."""
    near = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.65)
    return (f"; did you mean {near[0]!r}?" if near else ".") + f" Valid: {[*valid]}"


def explain_unknown_names(of_vllm: Mapping[str, str]) -> Callable[[Declared], Declared]:
    """Decorate a dataclass, so that making one with an unknown name is refused by `check_names`."""

    def decorate(declared: Declared) -> Declared:
        generated = declared.__init__

        @functools.wraps(generated)
        def init(self, *args, **options):
            check_names(f"{declared.__name__}()", options, declared.__dataclass_fields__, of_vllm)
            generated(self, *args, **options)

        declared.__init__ = init
        return declared

    return decorate


def seed_rule(seed: int) -> tuple[bool, str]:
    """The requirement of a random seed, for `check_values`."""
    return -(2**63) <= seed < 2**64, "a 64-bit integer (-2**63 to 2**64 - 1)"


def check_text(text: str) -> None:
    """Raise ValueError, with the position, if a text is not Unicode: if it has a lone surrogate.

    Python makes them of bytes that are not UTF-8, in the command line's arguments for example.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text is not valid Unicode: character {text[error.start]!r} at position "
            f"{error.start} is a lone surrogate; decode bytes by .decode('utf-8', 'replace')"
        ) from None
