"""What the bundled student, untaught, would clean away of a change, and what it leaves."""

from __future__ import annotations

import pytest
import torch

from dual_process.trainers.dual_process import Settings, holding
from dual_process.trainers.guards import STRANGE
from dual_process.trainers.looks import Looks


@pytest.fixture(scope="module")
def student(comfy):
    from dual_process.benchmarks.bundled import Laboratory

    with torch.inference_mode():
        return Laboratory().student(batch=8)


def test_stains_are_pulled_out_and_other_scenes_are_not(student):
    """Of a picture of another seed, the prior leaves nearly all; of a stain of a quarter of that size, about half."""

    def loop() -> list[float]:
        k = student.steps - 1
        x = student.roll(student.noise(5), k)
        with torch.no_grad():
            b = student.predict(x, k)
        scene = b.roll(1, 0) - b
        stain = torch.zeros_like(b)
        stain[..., 2:4, 2:4] = torch.randn(b.shape[:2], generator=torch.Generator().manual_seed(0))[..., None, None]
        shares = []
        for change in (scene, stain * scene.norm() / stain.norm() / 4):
            pull = holding(student, Settings(anchor=0.0, prior=1.0), torch.Generator().manual_seed(1), b + change, x, k)
            shares.append((pull * change).sum().item() * b.numel() / 2 / change.square().sum().item())
        return shares

    scene, stain = student.run(loop, beside=[])
    assert abs(scene) < 0.02 and stain > 0.4


def test_pictures_of_a_ruined_lora_are_strange_to_the_model(student):
    """Far above what people are told of, where the LoRA is one of random numbers."""
    looks = Looks(student, None, None, None, Settings(check_seeds=1), None)

    def loop() -> float:
        with torch.no_grad():
            for parameter in student.lora.parameters():
                parameter.normal_(0, 0.15, generator=torch.Generator().manual_seed(0))
        own, taught = [], [student.finished(3)]
        with student.lora.disabled():
            own.append(student.finished(3))
        return looks._taken_out(taught, 3) / looks._taken_out(own, 3)

    assert student.run(loop, beside=[]) > 1.5 * STRANGE
