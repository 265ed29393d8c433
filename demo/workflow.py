"""Workflows as files: from the front end's form to the form the HTTP API takes."""

from __future__ import annotations

import json
from typing import Any

from .client import Graph
from .comfyui import PACK

FOLDER = PACK / "example_workflows"
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
NOT_RUN = {"Note", "MarkdownNote"}


def template_names() -> list[str]:
    """Names of all workflows of `example_workflows/`."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def template(name: str) -> dict[str, Any]:
    """A workflow of `example_workflows/` in the front end's form."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def widget_names(node_info: dict[str, Any]) -> list[str | None]:
    """Names of a node type's widgets in saved order; None for the seed's "control after generate" box."""
    names: list[str | None] = []
    for group in ("required", "optional"):
        for name, (kind, *options) in node_info["input"].get(group, {}).items():
            options = options[0] if options else {}
            if not (isinstance(kind, list) or kind in WIDGET_TYPES) or options.get("forceInput"):
                continue
            names.append(name)
            if options.get("control_after_generate", kind == "INT" and name in ("seed", "noise_seed")):
                names.append(None)
    return names


def to_api(workflow: dict[str, Any], object_info: dict[str, Any]) -> Graph:
    """The API form of a saved workflow; `object_info` is the server's answer to /object_info."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    graph: Graph = {}
    for node in workflow["nodes"]:
        if node["type"] in NOT_RUN:
            continue
        values = zip(widget_names(object_info[node["type"]]), node.get("widgets_values", []))
        inputs = {name: value for name, value in values if name}
        inputs |= {slot["name"]: sources[slot["link"]] for slot in node.get("inputs", []) if slot["link"] is not None}
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return graph


def nodes_of(graph: Graph, class_type: str) -> list[str]:
    """Ids of the nodes of one type, in the order of the file."""
    return [node_id for node_id, node in graph.items() if node["class_type"] == class_type]
