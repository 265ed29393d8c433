"""The template in ComfyUI's own front end, in a real browser."""

import io

import pytest
from PIL import Image

from dual_process.demo.client import ComfyClient
from dual_process.demo.frontend import FrontEnd, find_browser
from dual_process.demo.workflow import to_api

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
        shown = page.script("return Object.values(app.nodeOutputs).flatMap(output => output.images ?? []);")
        errors = [line for line in page.errors() if "dual_process" in line]
    assert errors == []
    assert len(shown) >= 3, "before, after and the trainer's pairs"
    for picture in shown:
        assert Image.open(io.BytesIO(client.picture(picture))).width >= 64
