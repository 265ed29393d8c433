"""How good the built models are: the numbers of README.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import oracles, scenes
from .build_judge import Prompts, answer_ids, main_odds
from .build_student import Student, half_denoised
from .build_vae import decode_sampler, encode_sampler
from .judge_folder import wordings
from .pictures import DISTURBANCES, RUINS

PER_CASE = 256


def _seeded_noise(count: int, seed: int, device: str) -> Tensor:
    return torch.randn(count, 16, 8, 8, generator=torch.Generator().manual_seed(seed)).to(device)


@torch.no_grad()
def check_student(work: Path, vae: nn.Module, device: str, count: int = PER_CASE) -> dict[str, Any]:
    """Draw in 4 steps and measure with the oracles: how much is readable, how often a clause is obeyed, and how often
    a property holds when the prompt leaves it open."""
    student = Student(work, device)
    noise = _seeded_noise(count, 21, device)
    free = decode_sampler(vae, student.draw(noise, [{}] * count))
    report: dict[str, Any] = {
        "readable": {},
        "holds_when_open": {name: oracles.holds(free, name).float().mean().item() for name in scenes.PROPERTIES},
        "clauses_obeyed": {},
    }
    for steps in (1, 2, 4, 8):
        images = decode_sampler(vae, student.draw(noise, [{}] * count, steps))
        report["readable"][str(steps)] = oracles.measure(images)["readable"].float().mean().item()
    for j, name in enumerate(scenes.PROPERTIES):
        for value in (False, True):
            images = decode_sampler(vae, student.draw(_seeded_noise(count, 22 + j, device), [{name: value}] * count))
            obeyed = oracles.holds(images, name, "Yes" if value else "No").float().mean().item()
            report["clauses_obeyed"][scenes.CLAUSES[name][value]] = obeyed
    return report


def _cases(work: Path, vae: nn.Module, device: str, count: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Unseen pictures that are still scenes, as name -> (u, pictures)."""
    g = torch.Generator().manual_seed(31)
    u = torch.rand(count, len(scenes.FACTORS), generator=g).to(device)
    clean = scenes.render(u)
    cases = {"clean": clean, "decoded": decode_sampler(vae, encode_sampler(vae, clean))}
    cases |= {name: disturb(clean, g) for name, disturb in DISTURBANCES.items()}
    return {name: (u, images) for name, images in cases.items()} | {
        "half-denoised": half_denoised(Student(work, device), vae, count, seed=32)}


@torch.no_grad()
def check_judge(folder: Path, work: Path, vae: nn.Module, device: str, count: int = PER_CASE) -> dict[str, Any]:
    """Load the judge as a user does and count right answers in the main wordings (with the suffix), by condition."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    prompts, ids = Prompts(processor, device), answer_ids(processor)
    main = prompts.main().to(device)

    def odds(images: Tensor) -> Tensor:
        return main_odds(model, prompts, ids, images)

    texts = [wordings()[i] for i in main.tolist()]
    report: dict[str, Any] = {"right": {}, "no_to_ruins": {}}
    for name, (u, images) in _cases(work, vae, device, count).items():
        t = 2 * u[:, : len(scenes.PROPERTIES)] - 1
        wanted = (t[:, None] * prompts.side[main]).sum(-1) > 0
        wanted[:, -1] = True
        right = ((odds(images) > 0) == wanted).float().mean(0).tolist()
        report["right"][name] = dict(zip(texts, right, strict=True))
    g = torch.Generator().manual_seed(33)
    for name, ruin in RUINS.items():
        images = scenes.render(torch.rand(count, len(scenes.FACTORS), generator=g).to(device))
        images = torch.cat([ruin(part, g) for part in images.split(16)])
        report["no_to_ruins"][name] = (odds(images) < 0).float().mean(0).min().item()
    return report
