"""`dev.py demo` end to end with a very short training run: what it leaves behind, and whether the report is true."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from dual_process.demo.__main__ import summary
from dual_process.demo.client import ComfyClient
from dual_process.demo.comfyui import PACK, ComfyServer
from dual_process.demo.measure import evaluate
from dual_process.vlm.loading import load_judge
from dual_process.vlm.question import Question

KEYS = (
    "question wanted_answer steps train_seconds total_seconds judge_before judge_after oracle_before oracle_after "
    "readable_after drift lora comfyui torch transformers"
).split()


@pytest.fixture(scope="module")
def demo(comfyui, tmp_path_factory):
    """Output folder, report and printed text of a demo that trains two steps."""
    output = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "dual_process.demo", "--question", "palette", "--answer", "No", "--seed", "3"]
    result = subprocess.run(
        [*command, "--steps", "2", "--output", str(output)], capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads((output / "report.json").read_text())
    return SimpleNamespace(output=output, report=report, printed=result.stdout)


def failed(*arguments, **variables):
    """What a demo that ends with exit code 1 leaves on stderr."""
    command = [sys.executable, "-m", "dual_process.demo", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **variables})
    assert result.returncode == 1 and "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()


def test_a_folder_that_cannot_be_one_is_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    (line,) = failed("--output", str(tmp_path / "file"))
    assert f"--output {tmp_path / 'file'} cannot be a folder" in line


def test_a_server_that_dies_is_a_sentence_and_the_place_of_its_log(tmp_path):
    (tmp_path / "comfyui_version.py").touch()
    (tmp_path / "main.py").write_text("raise SystemExit('no such GPU')")
    *_, what, where = failed("--output", str(tmp_path / "out"), COMFYUI_PATH=str(tmp_path))
    log = tmp_path / "out" / "comfyui.log"
    assert what == "dev.py demo: ComfyUI stopped while starting." and where.endswith(str(log))
    assert "no such GPU" in log.read_text()


def test_a_server_that_ends_while_it_works_is_a_connection_error(comfyui, tmp_path):
    with ComfyServer(tmp_path, tmp_path / "log") as server, ComfyClient(server.url) as client:
        events = client.events("a prompt that is not finished", timeout=60)
        assert next(events)["type"] == "status"
        server.stop()
        with pytest.raises(ConnectionError):
            list(events)


def test_leaves_pictures_lora_and_report(demo):
    assert list(demo.report) == KEYS
    assert demo.report["steps"] == 2 and demo.report["wanted_answer"] == "No"
    assert (demo.output / demo.report["lora"]).is_file()
    assert len(list((demo.output / "pictures").glob("*.png"))) == 64
    sheet = Image.open(demo.output / "before_after.png")
    assert sheet.width >= 1500 and sheet.height >= 800


def test_report_is_recomputed_from_the_saved_pictures(demo):
    question = Question(demo.report["question"], demo.report["wanted_answer"])
    judge = load_judge(PACK / "tiny" / "judge")
    measured = evaluate(demo.output / "pictures", judge, question, "palette")
    reported = {key: demo.report[key] for key in measured}
    for metric, values in measured.pop("drift").items():
        assert reported["drift"][metric] == pytest.approx(values, abs=1e-5)
    del reported["drift"]
    assert reported == pytest.approx(measured, abs=1e-5)


def test_prints_the_report_in_four_lines(demo):
    lines = summary(demo.report, demo.output).splitlines()
    assert len(lines) == 4
    assert demo.printed.splitlines()[-4:] == lines
