"""The templates in ComfyUI's own front end, in a real browser."""

import io

import pytest
from PIL import Image

from dual_process.demo.client import ComfyClient
from dual_process.demo.frontend import FrontEnd, find_browser
from dual_process.demo.workflow import template, template_names, to_api

pytestmark = pytest.mark.skipif(not find_browser(), reason="needs Chromium and its chromedriver on the PATH")


def test_template_opens_and_runs(server, tmp_path):
    client = ComfyClient(server.url)
    client.post("/settings", {"Comfy.TutorialCompleted": True})
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


def test_every_template_opens_as_it_was_written(server):
    client = ComfyClient(server.url)
    client.post("/settings", {"Comfy.TutorialCompleted": True})
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


def test_what_the_judge_is_shown_runs_alone(server):
    """As the templates' notes say: select the node, press the play button above it, and nothing is trained."""
    client = ComfyClient(server.url)
    client.post("/settings", {"Comfy.TutorialCompleted": True})
    with FrontEnd(server.url) as page:
        page.open_template("dual_process", "Teach the horizon with a guide")
        page.script("app.canvas.selectNodes(app.graph.nodes.filter(n => n.type === 'DualProcessSeenByJudge'));")
        play = "[...document.querySelectorAll('.selection-toolbox button')].find(b => b.innerHTML.includes('--play]'))"
        page.wait_for(f"return {play}")
        page.script(f"{play}.click();")
        ran = "Object.keys(app.nodeOutputs).map(id => app.graph.getNodeById(id).type)"
        page.wait_for(f"const app = window.comfyAPI.app.app; return {ran}.includes('DualProcessSeenByJudge')", 120)
        assert "DualProcessTrainer" not in page.script(f"return {ran};")
