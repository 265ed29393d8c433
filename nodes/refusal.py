"""Refusing a value before anything runs, and so before a training."""

from collections.abc import Callable


def refusal(check: Callable[[str], object], value: str | None) -> str | bool:
    """What ``validate_inputs`` returns: True, or why ``check`` raises ValueError. A value that comes from another node
    is None here, and checked later."""
    if value is not None:
        try:
            check(value)
        except ValueError as error:
            return str(error)
    return True
