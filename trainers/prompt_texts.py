"""The words of the prompts, which reach a trainer's node already encoded, read from the graph that it runs in."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

# Inputs that hand on prompts or their words, by the names that ComfyUI's text and conditioning nodes give them. What a
# ControlNet's picture was drawn from, for one, comes in by other names, and so does what is not wanted in a picture.
HANDED_ON = re.compile(
    r"text(_[gl])?|clip_[gl]|t5xxl|llama|(user_)?prompt|prompts|value|string(_\w+)?|(\w+_)?(conditioning|positive)(_\w+)?"
)


def prompt_texts(
    node: Callable[[str], dict], trainer: str, names: Sequence[str] = ("positive", "more_prompts")
) -> list[str]:
    """Texts that the trainer's inputs of these names are made of, in that order, each once.

    Nodes that make up text as they run (a language model, a wildcard) give what they are told, not what they say.

    Args:
        node: gives the node of an id as ComfyUI's API form writes it, ``{"class_type": name, "inputs": {name:
            value or [id, output]}}``.
        trainer: id of the trainer's node.
    """
    inputs = node(trainer)["inputs"]
    found = [text for name in names if name in inputs for text in _texts(node, inputs[name], name == "negative")]
    return list(dict.fromkeys(found))


def _texts(node: Callable[[str], dict], value, unwanted: bool) -> list[str]:
    """``unwanted``: follow the negative prompt through nodes that hand on both, as those that apply a ControlNet do."""
    if isinstance(value, str):
        return [value] if value.strip() else []
    if not isinstance(value, list) or node(value[0])["class_type"] == "ConditioningZeroOut":
        return []
    inputs = node(value[0])["inputs"]
    names = sorted(filter(HANDED_ON.fullmatch, inputs), key=lambda name: name != "prompts")  # these come before
    if unwanted and "negative" in inputs:
        names = ["negative"]
    return [text for name in names for text in _texts(node, inputs[name], unwanted)]
