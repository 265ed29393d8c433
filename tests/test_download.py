"""Downloading a judge from a Hub on this machine, with a line that breaks."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dual_process.tests.hub import Hub, running
from dual_process.vlm.download import download_judge

WEIGHTS = os.urandom(30 * 1024 * 1024)
FILES = {
    "config.json": b"{}",
    "model.safetensors": WEIGHTS,
    "consolidated.safetensors": b"the weights once more",
    "pytorch_model.bin": b"a pickle",
    "modeling_evil.py": b"raise SystemExit",
    "onnx/model.json": b"{}",
}
DOWNLOAD = """
import sys
from pathlib import Path
from dual_process.vlm.download import download_judge

def report(done, total):
    if done / total > float(sys.argv[2]):
        raise SystemExit(f"stopped at {done}")
    reported.append(done / total)

reported = []
print(download_judge(sys.argv[3], Path(sys.argv[1]), report))
assert reported == sorted(reported)
print(reported[-1] if reported else "nothing to do")
"""


def download(url: str, root, stop_at: float = 1.0, hub_id: str = "owner/name", **environment):
    """``download_judge`` in a process of its own, because the Hub's address is read once, at import."""
    hub = {"HF_ENDPOINT": url, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", **environment}
    command = [sys.executable, "-c", DOWNLOAD, str(root), str(stop_at), hub_id]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **hub}, cwd=root)


def test_only_weights_and_configs_arrive_and_the_second_time_nothing(tmp_path):
    with running(Hub(FILES)) as hub:
        done = download(hub.url, tmp_path)
    folder = tmp_path / "owner" / "name"
    assert done.stdout.splitlines() == [str(folder), "1.0"], done.stderr
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.sent[-1][0] == "config.json"
    assert download(hub.url, tmp_path).stdout.splitlines() == [str(folder), "nothing to do"], "the Hub is gone by now"


def test_a_stopped_download_goes_on_where_it_stopped(tmp_path):
    weights = tmp_path / "owner" / "name" / "model.safetensors"
    with running(Hub(FILES)) as hub:
        assert "stopped at" in download(hub.url, tmp_path, stop_at=0.4).stderr
        assert not weights.exists() and not (weights.parent / "config.json").exists()
        assert download(hub.url, tmp_path).returncode == 0
    starts = [start for name, start in hub.sent if name == weights.name]
    assert len(starts) == 2 and starts[1] > 0.3 * len(WEIGHTS)
    assert weights.read_bytes() == WEIGHTS


def test_a_part_of_other_weights_is_not_continued(tmp_path):
    with running(Hub({**FILES, "model.safetensors": WEIGHTS[::-1]})) as hub:
        download(hub.url, tmp_path, stop_at=0.4)
    with running(Hub(FILES)) as hub:
        assert download(hub.url, tmp_path).returncode == 0
    assert (tmp_path / "owner" / "name" / "model.safetensors").read_bytes() == WEIGHTS


def test_a_line_that_breaks_costs_nothing_of_what_arrived(tmp_path):
    with running(Hub(FILES, breaks="model.safetensors")) as hub:
        first = download(hub.url, tmp_path)
        mended = first.returncode == 0  # by huggingface_hub itself, from its version 1 on
        assert mended or "ConnectionError: owner/name could not be downloaded" in first.stderr
        assert download(hub.url, tmp_path).returncode == 0
    assert (tmp_path / "owner" / "name" / "model.safetensors").read_bytes() == WEIGHTS
    starts = [start for name, start in hub.sent if name == "model.safetensors"]
    assert len(starts) == 2 and starts[1] > 0.3 * len(WEIGHTS)


@pytest.mark.parametrize("environment", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_no_connection_is_one_sentence(tmp_path, environment):
    failed = download("http://127.0.0.1:9", tmp_path, **environment)
    assert "ConnectionError: owner/name could not be downloaded" in failed.stderr
    assert "check the connection" in failed.stderr


def test_a_model_that_the_hub_does_not_know_is_one_sentence(tmp_path):
    with running(Hub(FILES)) as hub:
        failed = download(hub.url, tmp_path, hub_id="owner/other")
    assert "ValueError: The Hub refuses owner/other" in failed.stderr


@pytest.mark.parametrize("hub_id", ["", "no-owner", "../../etc", "a/b/c", "https://x/y", "owner/.."])
def test_only_hub_ids_are_downloaded(hub_id, tmp_path):
    with pytest.raises(ValueError, match="not a hub id"):
        download_judge(hub_id, tmp_path)
