"""Fixtures: ComfyUI inside this process, and a ComfyUI server with the pack installed."""

from types import SimpleNamespace

import pytest
import torch

from dual_process.demo.client import ComfyClient
from dual_process.demo.comfyui import ComfyServer, comfyui_folder, use_comfyui
from dual_process.vlm.question import Question


@pytest.fixture(scope="session")
def comfyui():
    """The folder of the ComfyUI under test."""
    try:
        return comfyui_folder()
    except FileNotFoundError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def comfy(comfyui, tmp_path_factory):
    """The `comfy` package, importable from here on together with ComfyUI's other modules (`nodes`, `folder_paths`)."""
    use_comfyui(tmp_path_factory.mktemp("comfyui_in_process"))
    import comfy.model_management
    import utils.extra_config  # noqa: F401  ComfyUI's nodes.py puts a folder with another utils.py first

    return comfy


@pytest.fixture
def lab(comfy):
    """Builders of tiny models, in the inference mode that ComfyUI runs nodes in."""
    from dual_process.tests import architectures

    with torch.inference_mode():
        yield architectures


@pytest.fixture
def trained(lab, monkeypatch):
    """Runs the trainer's node with a tiny SD3, for two steps unless other inputs are given; returns its output and the
    lines it showed."""
    from comfy_api.latest import io
    from comfy_execution.graph import DynamicPrompt

    from dual_process.nodes import trainer

    shown = []
    server = SimpleNamespace(
        client_id=None, send_sync=lambda *_: None, send_progress_text=lambda text, node: shown.append(text)
    )
    monkeypatch.setattr(trainer, "PromptServer", SimpleNamespace(instance=server))
    graph = DynamicPrompt({"7": {"class_type": "DualProcessTrainer", "inputs": {}}})
    hidden = {io.Hidden.unique_id: "7", io.Hidden.dynprompt: graph}
    node = trainer.Trainer.PREPARE_CLASS_CLONE({**hidden, "hidden_inputs": hidden})
    drawn = {"sampler_steps": 2, "sampler_name": "euler", "scheduler": "simple", "cfg": 1.0, "seed": 3}
    taught = {"steps": 2, "learning_rate": 1e-4, "rank": 4, "objective": "answer margin", "anchor": 0.1}
    rest = {"judge_noise": 0.1, "check_every": 1, "stop_at": 1.0, "checkpointing": False, "learn_at": "any step"}
    last = {"accumulate": 1, "targets": "", "self_check": False, "continue_from": trainer.NEW_LORA}

    def run(**inputs):
        parts = {"model": lab.build_model("SD3"), "vae": lab.build_vae("SD3"), "latent": lab.build_latent("SD3")}
        parts |= {"positive": lab.build_conditioning("SD3"), "questions": [Question("Is the line <b>thick</b>?")]}
        return node.EXECUTE_NORMALIZED(**{**parts, **drawn, **taught, **rest, **last, **inputs}), shown

    return run


@pytest.fixture(scope="session")
def server(comfyui, tmp_path_factory):
    """A running ComfyUI server of this session's own."""
    base = tmp_path_factory.mktemp("comfyui_server")
    with ComfyServer(base, base / "server.log") as running:
        yield running


@pytest.fixture
def client(server):
    """A websocket session with the server."""
    with ComfyClient(server.url) as connected:
        yield connected
