"""dev.py, without installing anything."""

import importlib.util
import signal
import sys
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("dev", Path(__file__).resolve().parents[1] / "dev.py")
dev = importlib.util.module_from_spec(spec)
spec.loader.exec_module(dev)


@pytest.mark.parametrize(
    "line, name",
    [("torch", "torch"), ("av>=14.2.0", "av"), ("comfy-kitchen==0.2.31", "comfy-kitchen"), ("#note", ""), ("", "")],
)
def test_requirement_name(line, name):
    assert dev.requirement_name(line) == name


def test_comfyui_requirements_leave_torch_to_us(tmp_path):
    (tmp_path / "requirements.txt").write_text("torch\ntorchsde\ntorchvision\ntorchaudio\n\n#note\nnumpy>=1.25.0\n")
    assert dev.comfyui_requirements(tmp_path) == ["torchsde", "numpy>=1.25.0"]


def test_comfyui_path_that_is_no_comfyui(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="no comfyui_version.py"):
        dev.user_comfyui()


def test_unknown_benchmark():
    with pytest.raises(SystemExit, match="there is no benchmark 'nonsense'"):
        dev.benchmark_script("nonsense")


def test_nothing_is_written_into_the_users_comfyui(tmp_path):
    (tmp_path / "server.py").touch()
    environment = dev.Environment(Path(sys.prefix))
    before = signal.getsignal(signal.SIGTERM)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import server"
    assert environment.run(["-c", code], tmp_path) == 0
    signal.signal(signal.SIGTERM, before)
    assert [path.name for path in tmp_path.iterdir()] == ["server.py"]
