"""Refusing values: before anything runs, and so before a training, where ComfyUI lets a node look then."""

from collections.abc import Callable

from comfy_api.latest import io


def refusal(check: Callable[[str], object], value: str | None) -> str | bool:
    """What ``validate_inputs`` returns: True, or why ``check`` raises ValueError. A value that comes from another node
    is None here, and checked later."""
    if value is not None:
        try:
            check(value)
        except ValueError as error:
            return str(error)
    return True


def check_choices(inputs: list[io.Input], values: dict[str, str]) -> None:
    """Refuse what is in no list, which ComfyUI 0.3.75 does not do for nodes of this kind.

    Args:
        inputs: a node's; of these, those that ``values`` names are looked at.

    Raises:
        ValueError: naming the input and its choices.
    """
    for one in inputs:
        if isinstance(one, io.Combo.Input) and values.get(one.id, one.options[0]) not in one.options:
            listed = ", ".join(map(str, one.options))
            raise ValueError(f"{one.id} is '{values[one.id]}', which is not one of its choices: {listed}.")
