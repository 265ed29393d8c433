"""Fixtures: ComfyUI inside this process, and a ComfyUI server with the pack installed."""

import pytest

from dual_process.demo.client import ComfyClient
from dual_process.demo.comfyui import ComfyServer, comfyui_folder, use_comfyui


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
    use_comfyui(tmp_path_factory.mktemp("comfyui_in_process"), comfyui)
    import comfy.model_management
    import utils.extra_config  # noqa: F401  ComfyUI's nodes.py puts a folder with another utils.py first

    return comfy


@pytest.fixture(scope="session")
def server(comfyui, tmp_path_factory):
    """A running ComfyUI server of this session's own."""
    base = tmp_path_factory.mktemp("comfyui_server")
    with ComfyServer(base, base / "server.log", comfyui) as running:
        yield running


@pytest.fixture
def client(server):
    """A websocket session with the server."""
    with ComfyClient(server.url) as connected:
        yield connected
