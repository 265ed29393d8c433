"""The words of the prompts, found in graphs as the front end sends them."""

from __future__ import annotations

import json
from pathlib import Path

from dual_process.trainers.prompt_texts import prompt_texts

TEMPLATE = Path(__file__).parent / "api" / "teach.json"


def test_of_the_template():
    """Its questions are texts as well."""
    assert prompt_texts(json.loads(TEMPLATE.read_text()).__getitem__, "10") == ["a landscape with two balls"]


def encoded(**inputs) -> dict:
    return {"class_type": "CLIPTextEncode", "inputs": {"clip": ["clip", 0], **inputs}}


def test_in_the_order_of_training_each_once_and_nothing_else():
    graph = {
        "clip": {"inputs": {"clip_name": "clip.safetensors", "type": "flux"}},
        "trainer": {"inputs": {"more_prompts": ["more 2", 0], "negative": ["bad", 0], "positive": ["control", 0]}},
        "control": {"inputs": {"positive": ["guided", 0], "negative": ["bad", 0], "image": ["draft", 0]}},
        "guided": {"inputs": {"conditioning": ["flux", 0], "guidance": 3.5}},
        "flux": encoded(clip_l="tags", t5xxl="a sentence", guidance=3.5),
        "bad": encoded(text="ugly"),
        "draft": {"inputs": {"samples": ["sampler", 0]}},
        "sampler": {"inputs": {"positive": ["of the draft", 0], "seed": 1}},
        "of the draft": encoded(text="a sketch"),
        "more 1": {"class_type": "DualProcessMorePrompts", "inputs": {"conditioning": ["linked", 0]}},
        "more 2": {"inputs": {"conditioning": ["both", 0], "prompts": ["more 1", 0]}},
        "linked": encoded(text=["words", 0]),
        "words": {"class_type": "PrimitiveString", "inputs": {"value": "from a box"}},
        "both": {"inputs": {"conditioning_1": ["sdxl", 0], "conditioning_2": ["flux", 0]}},
        "sdxl": encoded(text_g="big", text_l=" ", width=1024),
    }
    assert texts(graph) == ["tags", "a sentence", "from a box", "big"]
    assert texts(graph, ["negative"]) == ["ugly"]


def texts(graph: dict, names=("positive", "more_prompts")) -> list[str]:
    return prompt_texts(lambda number: {"class_type": "Any", **graph[number]}, "trainer", names)


def test_what_is_not_wanted_is_found_behind_nodes_that_hand_on_both():
    """As those that apply a ControlNet do. What is zeroed says nothing."""
    graph = {
        "trainer": {"inputs": {"positive": ["control", 0], "negative": ["control", 1]}},
        "control": {"inputs": {"positive": ["good", 0], "negative": ["bad", 0], "strength": 1.0}},
        "good": encoded(text="a hill"),
        "bad": encoded(text="ugly"),
    }
    assert texts(graph) == ["a hill"] and texts(graph, ["negative"]) == ["ugly"]
    graph["trainer"]["inputs"]["negative"] = ["zero", 0]
    graph["zero"] = {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["good", 0]}}
    assert texts(graph, ["negative"]) == []
