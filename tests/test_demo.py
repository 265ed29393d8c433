"""`dev.py demo` end to end with a very short training run: what it leaves behind, and whether the report is true."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from dual_process.demo.__main__ import summary
from dual_process.demo.comfyui import PACK
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
