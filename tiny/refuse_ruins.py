"""Last stage of the judge's training: say No to the ruins that it still takes for scenes, and Yes as surely as before.

Whether a scene is clean it goes on saying as it did (Li and Hoiem, arXiv 1606.09282): more ruins alone make a judge
lean to No about everything. Of the properties it learns a slope, for a No as sure as ever, whatever the picture, leaves
a generator nothing to follow.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import scenes
from .build_judge import ASKED, POOL, Pictures, Prompts, answer_ids, answer_logits, moved_to_err, save_average
from .build_student import Student, half_denoised
from .judge_folder import new_processor
from .pictures import RUINS
from .training import Average, descend, learning_rate

log = logging.getLogger(__name__)

STEPS, PEAK_RATE, SCENES, REFUSED_ODDS = 800, 5e-4, 12, -2.0
# kinds of ruins, how many are made for a step, and how many of them, which the judge likes best, are learned from
SHOWN = ((("bands",), 24, 5), (("blobs",), 12, 3), (("near_black", "ladder"), 2, 1), (tuple(RUINS), 4, 3))
# property -> where it is none, half way, and at its upper end; the palette is what judges are flattest about
WAYS = {"horizon": (0.78, 0.5, 0.22), "palette": (0.0, 0.5, 1.0), "line": (0.7, 2.45, 4.2), "depth": (-1.0, 0.0, 1.0)}
SHARES = torch.tensor((1.0, 3.0, 1.0, 1.0))  # how often each is on its way
SURE = (3.6, 5.0)  # log-odds of a sure Yes and of a sure No


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
            shown, place = on_the_way(pictures, SCENES)
            images = torch.cat((ruins, shown))
            ruined = torch.arange(len(images), device=device) < len(ruins)
            asked = asker.questions(len(images), pictures.generator)
            pictures.disturb(images, 2 / 3, 1)
            said = asker.odds(before, images[~ruined], asked[~ruined])[0]
            wanted = sloped(said, place, asker.prompts.side[asked[~ruined]])
        if step % 2:
            signs = torch.cat((-torch.ones(len(ruins), ASKED, device=device), wanted.sign()))
            images = _pushed(asker, model, images, asked, signs, pictures.generator)
        odds, other = asker.odds(model, images, asked)
        kept = nn.functional.smooth_l1_loss(odds[~ruined], wanted)
        refused = nn.functional.softplus(odds[ruined] - REFUSED_ODDS).mean()
        descend(2 * kept + 0.7 * refused + other, parameters, optimiser, learning_rate(step, steps, PEAK_RATE))
        average.update(model)
        if step % 100 == 0:
            log.info("refuse %d/%d kept %.3f refused %.3f %.0f s",
                     step, steps, kept.item(), refused.item(), time.time() - start)
    save_average(average, processor, model, folder)
    return {"seconds": time.time() - start}


def on_the_way(pictures: Pictures, count: int) -> tuple[Tensor, Tensor]:
    """Scenes [B, 3, 64, 64] with one property anywhere between its ends, every second one out of the pool, and where
    each property stands [B, 4]: -1 at its lower end, 1 at its upper end."""
    g = pictures.generator
    a = scenes.attributes(torch.rand(count, len(scenes.FACTORS), generator=g))
    a["sun_y"] = 0.1 + 0.8 * torch.rand(count, generator=g)
    moved = torch.multinomial(SHARES, count, True, generator=g)
    for column, (name, (low, _, high)) in enumerate(WAYS.items()):
        a[name] = torch.where(moved == column, low + (high - low) * torch.rand(count, generator=g), a[name])
    a["horizon_line"] = a["line"]
    images, place = scenes.draw(a), _place(a)
    rows = torch.randint(0, len(pictures.pool[0]), (count // 2,), generator=g).to(pictures.device)
    images, place = images.to(pictures.device), place.to(pictures.device)
    images[1::2], place[1::2] = pictures.pool[1][rows], _place(scenes.attributes(pictures.pool[0][rows]))
    return images, place


def _place(a: dict[str, Tensor]) -> Tensor:
    return torch.stack([(a[name] - middle) / (high - middle) for name, (_, middle, high) in WAYS.items()], 1)


def sloped(said: Tensor, place: Tensor, side: Tensor) -> Tensor:
    """Wanted log-odds [B, Q] where the judge ``said`` something about scenes whose properties stand at ``place``
    [B, 4], asked for ``side`` [B, Q, 4]: steep at the border, then a slope for No and almost none for Yes. Less where
    the judge was less sure, for it saw a half-denoised picture; about anything but a property, what it said."""
    t = (place[:, None] * side).sum(-1)
    slope = torch.where(t > 0, 3.7 * torch.tanh(5 * t), -4.4 * torch.tanh(12 * t.abs()) - 1.6 * t.abs())
    sure = torch.where(t > 0, *SURE)
    agreed = said.sign() == t.sign()
    return torch.where(agreed, slope * (said.abs() / sure).clamp(max=1), said)


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
