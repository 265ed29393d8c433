"""The templates in ComfyUI's own front end, in a real browser, drawn the classic way and as Nodes 2.0."""

import io
import time
from itertools import combinations

import pytest
from PIL import Image

from dual_process.demo.client import ComfyClient
from dual_process.demo.frontend import FrontEnd, find_browser
from dual_process.demo.workflow import template, template_names, to_api

pytestmark = pytest.mark.skipif(not find_browser(), reason="needs Chromium and its chromedriver on the PATH")


LIVE_PICTURES = "return document.querySelectorAll('img[alt=\"Live sampling preview\"]').length"
BOXES = """
    const { scale } = app.canvas.ds;
    return [...document.querySelectorAll("[data-node-id]")].map((element) => {
      const { x, y, width, height } = element.getBoundingClientRect();
      return [element.dataset.nodeId, x / scale, y / scale, width / scale, height / scale];
    });
"""


PANEL_HEIGHTS = """
    const nodes = app.graph.nodes.filter(({ dualProcessPanel }) => dualProcessPanel?.isConnected);
    return nodes.map(({ type, dualProcessPanel }) => [type, dualProcessPanel.offsetHeight]);
"""
PANEL_TEXT = (
    "const {{ graph }} = window.comfyAPI.app.app;"
    "const nodes = [...graph.nodes, ...graph.nodes.flatMap(({{ subgraph }}) => subgraph?.nodes ?? [])];"
    "return nodes.find(({{ type }}) => type === '{type}')?.dualProcessPanel.textContent;"
)


@pytest.fixture
def client(server):
    """A client of a server whose front end greets nobody and draws nodes the classic way."""
    client = ComfyClient(server.url)
    client.post("/settings", {"Comfy.TutorialCompleted": True, "Comfy.VueNodes.Enabled": False})
    return client


def test_template_opens_and_runs(server, client, tmp_path):
    with FrontEnd(server.url) as page:
        page.open_template("dual_process", "Teach the horizon")
        assert page.missing_nodes() == []
        object_info = client.get_json("/object_info")
        sent = page.script("return (await app.graphToPrompt()).output;")
        for node in sent.values():
            node.pop("_meta")
        assert to_api(page.saved(), object_info) == sent
        page.set_widgets("DualProcessTrainer", {"steps": 2, "check_every": 0, "seed": 61})
        page.run()
        page.screenshot(tmp_path / "finished.png")
        shown = page.script("return Object.values(app.nodeOutputs).flatMap(output => output?.images ?? []);")
        errors = [line for line in page.errors() if "dual_process" in line]
    assert errors == []
    assert len(shown) >= 3, "before, after and the trainer's pairs"
    for picture in shown:
        assert Image.open(io.BytesIO(client.picture(picture))).width >= 64


def test_every_template_opens_as_it_was_written(server, client):
    object_info = client.get_json("/object_info")
    with FrontEnd(server.url) as page:
        for name in template_names():
            saved = template(name)
            page.script("await app.loadGraphData(args[0], true, true, null, {showMissingModelsDialog: false});", saved)
            assert page.missing_nodes() == [], name
            sent = page.script("return (await app.graphToPrompt()).output;")
            for node in sent.values():
                node.pop("_meta")
            assert sent == to_api(saved, object_info), name
            shown = {node["id"]: node["size"] for node in page.saved()["nodes"]}
            for node in saved["nodes"]:
                assert shown[node["id"]] == pytest.approx(node["size"], abs=1), f"{name}: {node['type']} has no room"
        errors = [line for line in page.errors() if "dual_process" in line]
    assert errors == []


def test_nodes_2_have_room_and_let_go_of_the_live_picture(server, client):
    client.post("/settings", {"Comfy.VueNodes.Enabled": True})
    with FrontEnd(server.url) as page:
        for name in template_names():
            page.script(
                "await app.loadGraphData(args[0], true, true, null, {showMissingModelsDialog: false});", template(name)
            )
            page.script("app.canvas.ds.scale = 0.3; app.canvas.ds.offset = [60, 300]; app.canvas.setDirty(true, true);")
            boxes = _settled_boxes(page, len(template(name)["nodes"]))
            for one, other in combinations(boxes, 2):
                assert not _overlap(one[1:], other[1:]), f"{name}: nodes {one[0]} and {other[0]}"
        page.open_template("dual_process", "Teach the horizon with a guide")
        page.set_widgets("DualProcessTrainer", {"steps": 4, "check_every": 2, "seed": 62})
        page.script("app.queuePrompt(0);")
        page.wait_for(LIVE_PICTURES, 120)
        page.wait_for(LIVE_PICTURES.replace("return", "return !"), 120)
        page.wait_for(PANEL_TEXT.format(type="DualProcessSeenByJudge"), 120)
        heights = dict(page.script(PANEL_HEIGHTS))
        assert heights.keys() == {"DualProcessTrainer", "DualProcessSaveLoRA", "DualProcessSeenByJudge"}
        assert all(40 <= height <= 130 for height in heights.values()), f"long texts scroll: {heights}"


def test_results_are_shown_again_after_another_tab(server, client):
    with FrontEnd(server.url) as page:
        page.open_template("dual_process", "Teach the horizon with a guide")
        page.set_widgets("DualProcessTrainer", {"steps": 3, "check_every": 0, "seed": 63})
        page.script("app.queuePrompt(0);")
        page.wait_for(PANEL_TEXT.format(type="DualProcessTrainer"), 120)
        page.script("await app.extensionManager.command.execute('Comfy.NewBlankWorkflow');")
        page.run()
        page.script("await app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow');")
        curves = page.wait_for(PANEL_TEXT.format(type="DualProcessTrainer"))
        seen = page.wait_for(PANEL_TEXT.format(type="DualProcessSeenByJudge"))
    assert curves.count(" % ") == 2 and "Is the overlaid red line" in curves
    assert "Is the overlaid red line" in seen


def test_a_trainer_in_a_subgraph_shows_what_came_of_it(server, client):
    with FrontEnd(server.url) as page:
        page.open_template("dual_process", "Teach the horizon")
        page.set_widgets("DualProcessTrainer", {"steps": 2, "check_every": 0, "seed": 64})
        page.script("app.canvas.selectItems(app.graph.nodes.filter(n => n.type === 'DualProcessTrainer'));")
        page.script("await app.extensionManager.command.execute('Comfy.Graph.ConvertToSubgraph');")
        page.run()
        shown = page.script(PANEL_TEXT.format(type="DualProcessTrainer"))
    assert "Held-out seeds" in shown and shown.count(" % ") == 2


def _settled_boxes(page, count):
    """Of all nodes, as soon as there are so many and they have stopped growing."""
    deadline, boxes, before = time.monotonic() + 30, [], None
    while len(boxes) != count or boxes != before:
        assert time.monotonic() < deadline, f"{len(boxes)} of {count} nodes are drawn"
        time.sleep(0.3)
        boxes, before = page.script(BOXES), boxes
    return boxes


def _overlap(one, other):
    """Whether two boxes [x, y, width, height] share pixels."""
    return all(max(one[i], other[i]) < min(one[i] + one[i + 2], other[i] + other[i + 2]) for i in (0, 1))


def test_what_the_judge_is_shown_runs_alone(server, client):
    """As the templates' notes say: select the node, press the play button above it, and nothing is trained."""
    with FrontEnd(server.url) as page:
        page.open_template("dual_process", "Teach the horizon with a guide")
        page.script("app.canvas.selectNodes(app.graph.nodes.filter(n => n.type === 'DualProcessSeenByJudge'));")
        play = "[...document.querySelectorAll('.selection-toolbox button')].find(b => b.innerHTML.includes('--play]'))"
        page.wait_for(f"return {play}")
        page.script(f"{play}.click();")
        ran = "Object.keys(app.nodeOutputs).map(id => app.graph.getNodeById(id).type)"
        page.wait_for(f"const app = window.comfyAPI.app.app; return {ran}.includes('DualProcessSeenByJudge')", 120)
        assert "DualProcessTrainer" not in page.script(f"return {ran};")


def test_a_workflow_saved_after_a_run_has_values_of_inputs_alone(server, client):
    def values(page):
        """Of the pack's own nodes."""
        nodes = page.saved()["nodes"]
        return {node["type"]: node.get("widgets_values") for node in nodes if node["type"].startswith("DualProcess")}

    with FrontEnd(server.url) as page:
        page.open_template("dual_process", "Teach the horizon with a guide")
        page.set_widgets("DualProcessTrainer", {"steps": 2, "check_every": 0, "seed": 65})
        before = values(page)
        page.run()
        after = values(page)
    written = {node["type"]: node for node in template("Teach the horizon with a guide")["nodes"]}
    assert after == before and after.keys() == {type for type in written if type.startswith("DualProcess")}
    for type, kept in after.items():
        assert len(kept or []) == len(written[type].get("widgets_values", [])), type
