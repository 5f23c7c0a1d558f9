"""Forms of what JSON files hold: which entries their readers need, and of which types.

A form is called with a value: None where it has the form, else the path of the entry that has not,
such as "config.steps", "" being the value itself.
"""

from collections.abc import Callable
from typing import Any

Form = Callable[[Any], str | None]


def where(is_good: Callable[[Any], bool]) -> Form:
    """A value of which `is_good` is true."""
    return lambda value: None if is_good(value) else ""


def whole(least: int = 0, most: int = 2**62) -> Form:
    """An integer from `least` to `most`."""
    return where(lambda value: type(value) is int and least <= value <= most)


def number(least: float = -1e30) -> Form:
    """A finite number of at least `least`."""
    return where(lambda value: type(value) in (int, float) and least <= value < 1e30)


def optional(form: Form) -> Form:
    """None, or a value of this form."""
    return lambda value: None if value is None else form(value)


def list_of(form: Form) -> Form:
    """A list, all of it of this form."""
    return where(
        lambda value: isinstance(value, list) and all(form(each) is None for each in value)
    )


def mapping(form: Form) -> Form:
    """An object, each value of it of this form."""
    return where(
        lambda value: isinstance(value, dict) and all(form(each) is None for each in value.values())
    )


def record(entries: dict[str, Form], *added: str, others: bool = True) -> Form:
    """An object that has these entries; those `added` later it may lack.

    others: whether it may have more.
    """

    def fault_of(value: Any) -> str | None:
        if not isinstance(value, dict) or not (others or value.keys() <= entries.keys()):
            return ""
        for name, form in entries.items():
            if name not in value:
                if name in added:
                    continue
                return name
            if (fault := form(value[name])) is not None:
                return f"{name}.{fault}" if fault else name
        return None

    return fault_of


def _is_unicode(value: Any) -> bool:
    return isinstance(value, str) and not any("\ud800" <= each <= "\udfff" for each in value)


text = where(lambda value: isinstance(value, str))
# JSON can spell half of a character, which no file can hold or be named by.
unicode = where(_is_unicode)
boolean = where(lambda value: isinstance(value, bool))
