"""A sheet to lay out a workflow on: nodes are stacked in columns, groups go around columns."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from .workflow import widget_names

TOP, LEFT = 120, 40  # the first node's corner
GAP = 20  # around columns, and between a node and the next one's title bar
TITLE_BAR, GROUP_TITLE = 30, 50
SLOT, WIDGET, TEXT_LINE, LETTER = 20, 24, 15, 6.0  # px that ComfyUI's front end gives them
NODE_2, LINE_2, BADGE_2 = 12, 16, 20  # px that Nodes 2.0 take more: any node, a line of text, a pack's name
# px that nodes show after a run in; the panels are web/dual_process.js's
PICTURE, CURVE, TEXT_PANEL, LAST_LINE = 236, 124, 64, 80
SHOWN = {
    "DualProcessTrainer": CURVE + LAST_LINE + PICTURE,
    "DualProcessSaveLoRA": TEXT_PANEL,
    "DualProcessJudgeScore": TEXT_PANEL + PICTURE,
    "DualProcessSeenByJudge": TEXT_PANEL + PICTURE,
    "DualProcessHorizonGuide": PICTURE,
    "DualProcessPaletteGuide": PICTURE,
    "DualProcessLineWeightGuide": PICTURE,
    "DualProcessDepthGuide": PICTURE,
    "DualProcessCompositionGuide": PICTURE,
    "PreviewImage": PICTURE + 60,
}
NOTE_COLOURS = {"color": "#432", "bgcolor": "#653"}


class Out(NamedTuple):
    """An output of a node on the sheet."""

    node: int
    slot: int


class Sheet:
    """A workflow in the front end's form.

    Args:
        object_info: the server's answer to /object_info.
    """

    def __init__(self, object_info: dict[str, Any]):
        self.object_info = object_info
        self.nodes: list[dict[str, Any]] = []
        self.links: list[list[Any]] = []
        self.groups: list[dict[str, Any]] = []
        self._x, self._y, self._width = LEFT, TOP, 0

    def group(self, title: str, colour: str, width: int) -> None:
        """Start a group right of all others, with one column."""
        self._x += self._width + 3 * GAP if self.groups else 0
        self._y, self._width = TOP, width
        bounding = [self._x - GAP, TOP - TITLE_BAR - GROUP_TITLE, width + 2 * GAP, 0]
        number = len(self.groups) + 1
        group = {"id": number, "title": f"{number}  {title}", "bounding": bounding, "color": colour}
        self.groups.append({**group, "font_size": 24, "flags": {}})

    def column(self, width: int) -> None:
        """Start one more column in the group."""
        self._x, self._y, self._width = self._x + self._width + 2 * GAP, TOP, width
        self.groups[-1]["bounding"][2] += width + 2 * GAP

    def add(self, kind: str, title: str = "", models: tuple[dict[str, str], ...] = (), **given: Any) -> int:
        """Put a node below the last one and return its id.

        Args:
            kind: node type.
            title: instead of the type's name.
            models: what its loader needs, for the front end to offer as downloads.
            given: values of its widgets, and an Out for every input that is connected.
        """
        info = self.object_info[kind]
        declared = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        if set(given) - set(declared):
            raise ValueError(f"{kind} has no {', '.join(set(given) - set(declared))}.")
        widgets = widget_names(info)
        values = [_value(name, declared.get(name), given.get(name)) for name in widgets]
        names = [name for name in declared if name not in widgets] + [name for name in widgets if name]
        node_id = len(self.nodes) + 1
        inputs = []
        for slot, name in enumerate(names):
            entry = {"name": name, "type": _type(declared[name]), "link": None}
            if name in info["input"].get("optional", {}):
                entry["shape"] = 7
            if name in widgets:
                entry["widget"] = {"name": name}
            if isinstance(given.get(name), Out):
                entry["link"] = self._connect(given[name], node_id, slot)
            inputs.append(entry)
        outputs = [
            {"name": name, "type": output, "links": None} for name, output in zip(info["output_name"], info["output"])
        ]
        properties = {"cnr_id": "dual-process" if kind.startswith("DualProcess") else "comfy-core"}
        properties |= {"Node name for S&R": kind} | ({"models": list(models)} if models else {})
        height = 6 + SLOT * max(len(names) - len([name for name in widgets if name]), len(outputs)) + SHOWN.get(kind, 0)
        height += NODE_2 + (BADGE_2 if kind.startswith("DualProcess") else 0)
        for name, value in zip(widgets, values):
            text = name and declared[name][0] == "STRING"
            if text and _options(declared[name]).get("multiline"):
                height += max(90, 20 + self._lines(value))
            else:
                height += WIDGET + (LINE_2 if text else 0)
        self._place(kind, title, height + (8 if widgets else 0), inputs, outputs, values, properties)
        return node_id

    def note(self, text: str, title: str = "Read me") -> None:
        """Put a note below the last node."""
        self._place("MarkdownNote", title, 60 + self._lines(text), [], [], [text], {}, NOTE_COLOURS)

    def height(self, node: int) -> int:
        """Of a node, px."""
        return self.nodes[node - 1]["size"][1]

    def leave(self, height: int) -> None:
        """Leave free space below the last node."""
        self._y += height

    def saved(self) -> dict[str, Any]:
        """The workflow as the front end would save it."""
        return {
            "id": "00000000-0000-0000-0000-000000000000",
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": self.nodes,
            "links": self.links,
            "groups": self.groups,
            "config": {},
            "extra": {"ds": {"scale": 0.7, "offset": [90, 150]}},
            "version": 0.4,
        }

    def _lines(self, text: str) -> int:
        """Height of a text in the column."""
        rows = sum(max(1, math.ceil(len(line) * LETTER / (self._width - GAP))) for line in text.splitlines())
        return rows * TEXT_LINE

    def _connect(self, source: Out, node_id: int, slot: int) -> int:
        output = self.nodes[source.node - 1]["outputs"][source.slot]
        link_id = len(self.links) + 1
        output["links"] = [*(output["links"] or []), link_id]
        self.links.append([link_id, source.node, source.slot, node_id, slot, output["type"]])
        return link_id

    def _place(self, kind, title, height, inputs, outputs, values, properties, colours=None) -> None:
        node = {
            "id": len(self.nodes) + 1,
            "type": kind,
            "pos": [self._x, self._y],
            "size": [self._width, height],
            "flags": {},
            "order": len(self.nodes),
            "mode": 0,
            "inputs": inputs,
            "outputs": outputs,
            **({"title": title} if title else {}),
            "properties": properties,
            "widgets_values": values,
            **(colours or {}),
        }
        self.nodes.append(node)
        bounding = self.groups[-1]["bounding"]
        bounding[3] = max(bounding[3], self._y + height + GAP - bounding[1])
        self._y += height + GAP + TITLE_BAR


def _options(declared: list[Any]) -> dict[str, Any]:
    return declared[1] if len(declared) > 1 else {}


def _type(declared: list[Any]) -> str:
    return "COMBO" if isinstance(declared[0], list) else declared[0]


def _value(name: str | None, declared: list[Any] | None, given: Any) -> Any:
    """What a widget holds: what was given, else its default; nothing when it is connected, and "fixed" in the "control
    after generate" box of a seed."""
    if name is None:
        return "fixed"
    if isinstance(given, Out):
        return ""
    if given is not None:
        return given
    choices = declared[0] if isinstance(declared[0], list) else _options(declared).get("options", [""])
    return _options(declared).get("default", choices[0])
