"""Last stage of the judge's training: say No to the ruins that it still takes for scenes, and change nothing else.

About scenes its own log-odds of before are the targets (Li and Hoiem, arXiv 1606.09282). Without that, more ruins make
a judge lean to No about everything.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .build_judge import ASKED, POOL, Pictures, Prompts, answer_ids, answer_logits, moved_to_err, save_average
from .build_student import Student, half_denoised
from .judge_folder import new_processor
from .pictures import RUINS
from .training import Average, descend, learning_rate

log = logging.getLogger(__name__)

STEPS, PEAK_RATE, SCENES, REFUSED_ODDS = 800, 5e-4, 12, -2.0
# kinds of ruins, how many are made for a step, and how many of them, which the judge likes best, are learned from
SHOWN = ((("bands",), 24, 5), (("blobs",), 12, 3), (("near_black", "ladder"), 2, 1), (tuple(RUINS), 4, 3))


def refuse_ruins(first: Path, folder: Path, student: Path, vae: nn.Module, device: str, steps: int = STEPS,
                 pool: int = POOL) -> dict[str, float]:
    """Go on with the judge in ``first``; half of what it sees are ruins, of many those that it likes best.

    Args:
        folder: where the judge is written.
        student: folder of the student, which half of the scenes come through.
        pool: number of pictures that are made with it.
    """
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(17)
    start = time.time()
    pictures = Pictures(17, device, half_denoised(Student(student, device), vae, pool, seed=12))
    before, model = (AutoModelForImageTextToText.from_pretrained(first, dtype=torch.float32).to(device)
                     for _ in range(2))
    before.requires_grad_(False)
    processor = new_processor()
    asker = Asker(Prompts(processor, device), answer_ids(processor))
    parameters = list(model.parameters())
    average = Average(model, 0.98)
    optimiser = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(steps):
        with torch.no_grad():
            ruins = torch.cat([_liked(asker, model, pictures, *shown) for shown in SHOWN])
            images = torch.cat((ruins, pictures.undisturbed(SCENES)))
            ruined = torch.arange(len(images), device=device) < len(ruins)
            asked = asker.questions(len(images), pictures.generator)
            pictures.disturb(images, 2 / 3, 1)
            said = asker.odds(before, images, asked)[0]
        if step % 2:
            signs = torch.where(ruined[:, None], -1.0, said.sign())
            images = _pushed(asker, model, images, asked, signs, pictures.generator)
        odds, other = asker.odds(model, images, asked)
        kept = nn.functional.smooth_l1_loss(odds[~ruined], said[~ruined])
        refused = nn.functional.softplus(odds[ruined] - REFUSED_ODDS).mean()
        descend(1.5 * kept + 0.7 * refused + other, parameters, optimiser, learning_rate(step, steps, PEAK_RATE))
        average.update(model)
        if step % 100 == 0:
            log.info("refuse %d/%d kept %.3f refused %.3f %.0f s",
                     step, steps, kept.item(), refused.item(), time.time() - start)
    save_average(average, processor, model, folder)
    return {"seconds": time.time() - start}


class Asker:
    """Asks a judge some of the prompts."""

    def __init__(self, prompts: Prompts, ids: dict[str, int]) -> None:
        self.prompts, self.ids = prompts, ids
        self.clean = prompts.main()[-1:].to(prompts.last.device)

    def questions(self, count: int, generator: torch.Generator) -> Tensor:
        """Rows of prompts [count, Q]: whether it is clean, and others at random."""
        weights = self.prompts.weights(1.0)
        asked = torch.multinomial(weights, count * ASKED, True, generator=generator).view(count, ASKED)
        asked = asked.to(self.clean.device)
        asked[:, :1] = self.clean
        return asked

    def odds(self, model: Any, images: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
        """Log-odds of Yes [B, Q] about pictures [B, 3, 64, 64], and the mean probability of any third word."""
        places = self.prompts.last[asked][..., None]
        with torch.autocast(images.device.type, torch.bfloat16):
            logits = answer_logits(model, images, self.prompts.tokens[asked], places)[:, :, 0]
        yes, no = logits.float().log_softmax(-1)[..., [self.ids["yes"], self.ids["no"]]].unbind(-1)
        return yes - no, (1 - yes.exp() - no.exp()).mean()


def _liked(asker: Asker, model: Any, pictures: Pictures, kinds: tuple[str, ...], made: int, taken: int) -> Tensor:
    """Of ``made`` pictures ruined in one of these ways, the ``taken`` that the judge takes for clean most surely."""
    images = pictures.undisturbed(made)
    ruins = {kind: RUINS[kind] for kind in kinds}
    for row in range(made):
        images[row:row + 1] = pictures.pick(ruins)(images[row:row + 1], pictures.generator)
    odds, _ = asker.odds(model, images, asker.clean.expand(made, 1))
    return images[odds[:, 0].argsort(descending=True)[:taken]]


def _pushed(asker: Asker, model: Any, images: Tensor, asked: Tensor, wanted: Tensor,
            generator: torch.Generator) -> Tensor:
    """The pictures, half of them moved to where the model says the contrary of ``wanted`` [B, Q] (signs)."""
    rows = torch.randperm(len(images), generator=generator)[: len(images) // 2].to(images.device)
    moved = images[rows].clone().requires_grad_()
    odds, _ = asker.odds(model, moved, asked[rows])
    return moved_to_err(images, rows, moved, nn.functional.softplus(-odds * wanted[rows]).mean(), generator)
