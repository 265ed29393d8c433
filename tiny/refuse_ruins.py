"""Last stage of the judge's training: say No to the ruins that it still takes for scenes, and teach as before.

What a judge teaches is its gradient, and that is easily spoilt: taught more ruins with nothing but its answers held, it
went on answering well and taught worse. So of good pictures both the answers and their gradients are held to what they
were (Czarnecki et al., Sobolev Training, arXiv 1706.04859). Stripes as wide as a patch are lost in the patch embedding,
whose filters are smooth; the embeddings therefore learn alone at first. All this makes the judge suspicious of noise,
which the last part takes back half way: the mean of the weights before and after it is kept.
"""

from __future__ import annotations

import copy
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, smooth_l1_loss, softplus

from .build_judge import ASKED, POOL, Pictures, Prompts, answer_ids, odds_of_yes
from .build_student import Student, half_denoised
from .judge_folder import new_processor, save_judge
from .pictures import DISTURBANCES, RUINS
from .training import Average, descend, learning_rate

log = logging.getLogger(__name__)

GOOD, REFUSED_ODDS, CLEAN_ODDS = 16, -3.0, 3.0


@dataclass(frozen=True)
class Part:
    """Parameters that learn have ``name`` in theirs; ``bent`` and ``noisy`` are weights of the loss."""

    name: str
    steps: int
    rate: float
    bent: float
    noisy: float = 0.0


PARTS = (Part("embeddings", 900, 2e-3, bent=1.0), Part("", 300, 3e-4, bent=3.0))
FORGIVE_NOISE = Part("", 200, 1e-4, bent=3.0, noisy=0.5)
NOISY = 64, 6  # how many noisy scenes are made for a step, and how many, which the judge likes least, are learned from
# kinds of ruins, how many are made for a step, and how many of them, which the judge likes best, are learned from
SHOWN = ((("bands",), 28, 6), (("blobs",), 36, 7), (tuple(RUINS), 3, 2))


def refuse_ruins(first: Path, folder: Path, student: Path, vae: nn.Module, device: str, less: int = 1,
                 pool: int = POOL) -> dict[str, float]:
    """Go on with the judge in ``first``.

    Args:
        folder: where the judge is written.
        student: folder of the student, which half of the good pictures come through.
        less: how many times fewer steps are taken.
        pool: number of pictures that are made with it.
    """
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(17)
    start = time.time()
    pictures = Pictures(17, device, half_denoised(Student(student, device), vae, pool, seed=12))
    eager = {"dtype": torch.float32, "attn_implementation": "eager"}  # the attention that has second derivatives
    before, model = (AutoModelForImageTextToText.from_pretrained(first, **eager).to(device).requires_grad_(False)
                     for _ in range(2))
    processor = new_processor()
    asker = Asker(Prompts(processor, device), answer_ids(processor), pictures.generator)
    for part in PARTS:
        learn(asker, before, model, pictures, part, less).copy_to(model)
    suspicious = copy.deepcopy(model).requires_grad_(False)
    learn(asker, suspicious, model, pictures, FORGIVE_NOISE, less).copy_to(model)
    with torch.no_grad():
        for forgiving, parameter in zip(model.parameters(), suspicious.parameters(), strict=True):
            forgiving.lerp_(parameter, 0.5)
    save_judge(model, processor, folder)
    return {"seconds": time.time() - start}


def learn(asker: Asker, before: Any, model: Any, pictures: Pictures, part: Part, less: int = 1) -> Average:
    """Train a part for a share of its steps; returns the average of the weights."""
    parameters = [p.requires_grad_() for name, p in model.named_parameters() if part.name in name]
    average, steps = Average(model, 0.98), part.steps // less
    optimiser = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(steps):
        ruins = torch.cat([liked(asker, model, ruined(pictures, kinds, made), taken) for kinds, made, taken in SHOWN])
        refused = softplus(asker.odds(model, ruins, asker.questions(len(ruins))) - REFUSED_ODDS).mean()
        _, good = pictures.undisturbed(GOOD)
        pictures.disturb(good, 1 / 4, 1)
        kept, bent = changed(asker, before, model, good)
        loss = 2 * kept + part.bent * bent + refused
        if part.noisy:
            loss = loss + part.noisy * suspected(asker, model, pictures)
        descend(loss, parameters, optimiser, learning_rate(step, steps, part.rate))
        average.update(model)
        if step % 50 == 0:
            log.info("refuse %d/%d refused %.3f kept %.3f bent %.3f",
                     step, steps, refused.item(), kept.item(), bent.item())
    return average


def suspected(asker: Asker, model: Any, pictures: Pictures) -> Tensor:
    """The loss of noisy pictures that are clean but for that, those that the judge likes least."""
    made, taken = NOISY
    _, images = pictures.undisturbed(made)
    noisy = torch.cat([DISTURBANCES["noisy"](image, pictures.generator) for image in images.split(1)])
    worst = liked(asker, model, noisy, taken, least=True)
    return softplus(CLEAN_ODDS - asker.odds(model, worst, asker.is_it_clean(taken))).mean()


class Asker:
    """Asks a judge some of the prompts, whether the picture is clean among them."""

    def __init__(self, prompts: Prompts, ids: dict[str, int], generator: torch.Generator) -> None:
        self.prompts, self.ids, self.generator = prompts, ids, generator
        self.clean = prompts.main()[-1].item()

    def questions(self, count: int) -> Tensor:
        """Rows of prompts [count, Q]: whether it is clean, and others at random."""
        weights = self.prompts.weights(1.0)
        asked = torch.multinomial(weights, count * ASKED, True, generator=self.generator).view(count, ASKED)
        asked[:, 0] = self.clean
        return asked.to(self.prompts.last.device)

    def is_it_clean(self, count: int) -> Tensor:
        """Rows of prompts [count, 1]: whether it is."""
        return torch.full((count, 1), self.clean, device=self.prompts.last.device)

    def odds(self, model: Any, images: Tensor, asked: Tensor) -> Tensor:
        """Log-odds of Yes [B, Q] about pictures [B, 3, 64, 64]."""
        return odds_of_yes(model, self.prompts, self.ids, images, asked)


def ruined(pictures: Pictures, kinds: tuple[str, ...], count: int) -> Tensor:
    """Pictures [B, 3, 64, 64], each ruined in one of these ways."""
    _, images = pictures.undisturbed(count)
    ruins = {kind: RUINS[kind] for kind in kinds}
    return torch.cat([pictures.pick(ruins)(image, pictures.generator) for image in images.split(1)])


@torch.no_grad()
def liked(asker: Asker, model: Any, images: Tensor, taken: int, least: bool = False) -> Tensor:
    """Of pictures [B, 3, 64, 64] the ``taken`` that the judge takes for clean most surely, or least."""
    odds = asker.odds(model, images, asker.is_it_clean(len(images)))[:, 0]
    return images[odds.topk(taken, largest=not least).indices]


def changed(asker: Asker, before: Any, model: Any, good: Tensor) -> tuple[Tensor, Tensor]:
    """How far the log-odds about good pictures [B, 3, 64, 64] are from ``before``, and how far, as a share of its
    square, the gradient of a random sum of them; of gradients count means over 2 x 2 and 4 x 4 pixels, for finer
    changes hardly come through an autoencoder."""
    good.requires_grad_()
    asked = asker.questions(len(good))
    signs = torch.randn(asked.shape, generator=asker.generator).to(good)
    odds, gradients = [], []
    for judge in (before, model):
        odds.append(asker.odds(judge, good, asked))
        (gradient,) = torch.autograd.grad((odds[-1] * signs).sum(), good, create_graph=judge is model)
        gradients.append(torch.cat([k / 2 * avg_pool2d(gradient, k).flatten(1) for k in (2, 4)], 1))
    was, now = gradients
    bent = (now - was).square().sum(1) / was.square().sum(1).clamp(min=1e-8)
    return smooth_l1_loss(odds[1], odds[0].detach()), bent.clamp(max=5).mean()
