"""Rebuild the bundled tiny models from fixed seeds: ``python -m dual_process.tiny.build``.

Stages: autoencoder, judge, student, judge again on the student's pictures, judge again on ruins, a judge that reads
guides too and compares two pictures, check. Each leaves its record in the work folder and is skipped when that is
there, so that a stopped build goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from ..demo.comfyui import use_comfyui
from . import build_judge, build_student, build_vae, refuse_ruins, teach_guides
from .check import PER_CASE, check_judge, check_student
from .text_encoder import TEXT_ENCODER
from .training import save

log = logging.getLogger(__name__)

HERE = Path(__file__).parent
CHECKPOINT = "models/dual_process_tiny.safetensors"
QUICK_SHARE = 50  # --quick trains this many times less: it tries the code, the models are of no use


class Stages:
    """Runs what is not done yet and keeps what each stage reported."""

    def __init__(self, work: Path) -> None:
        self.work = work
        work.mkdir(parents=True, exist_ok=True)
        self.reports: dict[str, dict] = {}

    def run(self, name: str, stage: Callable[[], dict]) -> None:
        record = self.work / f"{name}.json"
        if not record.exists():
            log.info("stage %s", name)
            start = time.time()
            report = stage()
            record.write_text(json.dumps({**report, "stage_seconds": round(time.time() - start, 1)}))
        self.reports[name] = json.loads(record.read_text())


def pack_checkpoint(work: Path, out: Path) -> None:
    """Write the half-precision checkpoint for the stock loader, and the text encoder."""
    weights = {f"model.diffusion_model.{name}": w for name, w in load_file(work / "student.safetensors").items()}
    weights |= {f"first_stage_model.{name}": w for name, w in load_file(work / "vae.safetensors").items()}
    save(weights, out / CHECKPOINT, torch.float16)
    save(load_file(work / "text.safetensors"), out / TEXT_ENCODER.relative_to(HERE), torch.float16)


def build(out: Path, work: Path, device: str, quick: bool) -> dict:
    """All stages; returns and writes the report."""
    less = QUICK_SHARE if quick else 1
    stages = Stages(work)
    stages.run("vae", lambda: build_vae.train_vae(work / "vae.safetensors", device, build_vae.STEPS // less))
    vae = build_vae.load_vae(work / "vae.safetensors", device)
    stages.run("judge_first", lambda: build_judge.train_judge(
        work / "judge_first", device, build_judge.LOOK_STEPS // less, build_judge.STEPS // less))
    stages.run("student", lambda: build_student.train_student(
        work, vae, device, build_student.STEPS // less, build_student.SCENES // less))
    pack_checkpoint(work, out)
    stages.run("judge_finished", lambda: build_judge.finish_judge(
        work / "judge_first", work / "judge_finished", work, vae, device, build_judge.FINISH_STEPS // less,
        build_judge.POOL // less))
    stages.run("refuse_ruins", lambda: refuse_ruins.refuse_ruins(
        work / "judge_finished", work / "judge", work, vae, device, less, build_judge.POOL // less))
    stages.run("teach_guides", lambda: teach_guides.teach_guides(
        work / "judge", work / "judge_of_guides", work, build_vae.load_vae(work / "vae.safetensors", "cpu"), less,
        teach_guides.POOL // less))
    for judge in ("judge", "judge_of_guides"):
        shutil.copytree(work / judge, out / judge, dirs_exist_ok=True)
    pictures = PER_CASE // less
    stages.run("check_student", lambda: check_student(work, vae, device, pictures))
    for judge in ("judge", "judge_of_guides"):
        stages.run(f"check_{judge}", lambda: check_judge(out / judge, work, vae, device, pictures))
    report = {"device": device, "torch": torch.__version__, **stages.reports}
    (out / "models" / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=best)
    parser.add_argument("--quick", action="store_true", help="a fiftieth of the training, to try the code")
    parser.add_argument("--out", type=Path, default=HERE, help="the folder to write models/, judge/ and so on into")
    parser.add_argument("--work", type=Path, help="folder for the stages' files, kept (default: OUT/build)")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    work = options.work or options.out / "build"
    use_comfyui(work / "comfyui")
    from comfy.cli_args import args

    args.cpu = options.device == "cpu"
    report = build(options.out, work, options.device, options.quick)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
