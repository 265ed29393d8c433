"""Train the judge: what it sees is what the real processor makes of pictures, what it reads is the real chat template.

Its answers are graded, not hard: the wanted log-odds grow with how clearly a property holds. A judge trained to plain
Yes or No is flat on both sides of the border, and a flat judge gives a generator nothing to follow.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import scenes
from .build_student import Student, half_denoised
from .judge_folder import ANSWERS, IMAGE_TOKENS, chat, new_model, new_processor, save_judge
from .pictures import DISTURBANCES, RUINS, SUBTLE, Ruin
from .questions import KEEP_WORDINGS, SUFFIX, WORDINGS
from .training import Average, descend, learning_rate

log = logging.getLogger(__name__)

LOOK_STEPS, STEPS, FINISH_STEPS, SCENES, ASKED, PEAK_RATE = 400, 1800, 1200, 32, 3, 1.5e-3
SLOPE = 0.2  # weight of the distance between log-odds and wanted log-odds
ATTACK = 2.0  # L2 distance over all channels and pixels
POOL = 4096  # pictures that came through the generator
EDGE_ODDS, FULL_ODDS, RUIN_ODDS = 3.0, 5.5, -5.0  # wanted log-odds at the gap's edge, at the far end, of a ruin


class Texts:
    """Questions about ``pictures`` at once as tokens of the real processor, padded on the right: ``tokens`` [P, L] and
    ``last`` [P], the place whose next token is the answer."""

    def __init__(self, processor: Any, texts: Sequence[str], device: str, pictures: int = 1) -> None:
        rows = [self._tokens(processor, text, pictures) for text in texts]
        self.last = torch.tensor([len(row) - 1 for row in rows], device=device)
        length = int(self.last.max()) + 2
        self.tokens = torch.tensor([row + [processor.tokenizer.pad_token_id] * (length - len(row)) for row in rows],
                                   device=device)

    @staticmethod
    def _tokens(processor: Any, text: str, pictures: int) -> list[int]:
        prompt = processor.apply_chat_template(chat(text, pictures), add_generation_prompt=True)
        picture = torch.zeros(3, scenes.SIDE, scenes.SIDE, dtype=torch.uint8)
        return processor(text=prompt, images=[picture] * pictures)["input_ids"][0]


class Prompts(Texts):
    """Every wording about scenes with and without the suffix.

    ``side`` [P, 4] says what a prompt asks: +1 for a property's upper half, -1 for the lower half, all 0 for "is it
    clean".
    """

    def __init__(self, processor: Any, device: str) -> None:
        texts, sides = [], []
        for column, (upper, lower) in enumerate(WORDINGS.values()):
            for sign, wordings in ((1, upper), (-1, lower)):
                texts += list(wordings)
                sides += [[sign if j == column else 0 for j in range(len(WORDINGS))]] * len(wordings)
        texts += KEEP_WORDINGS
        sides += [[0] * len(WORDINGS)] * len(KEEP_WORDINGS)
        self.side = torch.tensor(sides * 2, dtype=torch.float32, device=device)
        super().__init__(processor, [text + suffix for suffix in (SUFFIX, "") for text in texts], device)

    def main(self) -> Tensor:
        """Rows of the wordings used everywhere, the first of each with the suffix: upper, lower, …, clean [9]."""
        lengths = [len(w) for pair in WORDINGS.values() for w in pair]
        return torch.tensor([0, *lengths]).cumsum(0)

    def weights(self, progress: float) -> Tensor:
        """How often each prompt is asked after that share of the training: first one wording of each question, then
        the opposite too, then all. Begun with everything at once, opposite wordings cancel out for a long time."""
        weight = torch.ones(len(self.side)) if progress > 0.4 else torch.zeros(len(self.side))
        weight[self.main()[:: 1 if progress > 0.2 else 2]] = 6.0
        return weight


def wanted_odds(u: Tensor, side: Tensor, ruined: Tensor) -> Tensor:
    """Log-odds of Yes [B, Q] for scenes u [B, 8], prompts' side [B, Q, 4] and ruined [B]."""
    t = 2 * u[:, None, :len(scenes.PROPERTIES)] - 1
    gap = scenes.GAP_SHARE
    clear = (t.abs() - gap).clamp(min=0) / (1 - gap)
    odds = t.sign() * (EDGE_ODDS * (t.abs() / gap).clamp(max=1) + (FULL_ODDS - EDGE_ODDS) * clear)
    odds = (odds * side).sum(-1)
    odds = torch.where((side == 0).all(-1), torch.full_like(odds, FULL_ODDS), odds)
    return torch.where(ruined[:, None], torch.full_like(odds, RUIN_ODDS), odds)


def image_features(model: nn.Module, images: Tensor) -> Tensor:
    """What the language model is given of pictures in 0..1 [B, 3, S, S]: [B, 16, width], as after the processor."""
    return torch.stack(list(model.model.get_image_features((images[:, None] - 0.5) / 0.5).pooler_output))


def answer_logits(model: nn.Module, images: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
    """Logits [B, Q, K, V] at ``places`` [B, Q, K] of prompts [B, Q, L] about pictures in 0..1 [B, 3, S, S], or about
    several at once [B, N, 3, S, S].

    The vision tower runs once per picture. The result equals the model's own forward on the processor's output.
    """
    count, asked, length = tokens.shape
    embedded = model.get_input_embeddings()(tokens)
    shown = images if images.ndim == 5 else images[:, None]
    features = image_features(model, shown.flatten(0, 1)).unflatten(0, shown.shape[:2]).flatten(1, 2)
    features = features[:, None].expand(-1, asked, -1, -1).to(embedded.dtype)
    pictured = (tokens == model.config.image_token_id)[..., None]
    embedded = embedded.masked_scatter(pictured, features).flatten(0, 1)
    hidden = model.model.text_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    chosen = hidden.view(count, asked, length, -1).gather(2, places[..., None].expand(-1, -1, -1, hidden.shape[-1]))
    return model.lm_head(chosen)


class Pictures:
    """Endless training pictures: seven sixteenths ruined, the others scenes, most of both disturbed.

    Args:
        pool: optional (u [N, 8], pictures [N, 3, 64, 64]) that came through the generator, half of what is shown then.
    """

    def __init__(self, seed: int, device: str, pool: tuple[Tensor, Tensor] | None = None) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device, self.pool = device, pool

    def pick(self, choices: dict[str, Ruin]) -> Ruin:
        return list(choices.values())[int(torch.randint(0, len(choices), (), generator=self.generator))]

    def _factors(self, count: int) -> Tensor:
        """u [B, 8]; in a quarter of the scenes one property is on its way between its halves, where a picture that is
        being taught passes."""
        g = self.generator
        u = torch.rand(count, len(scenes.FACTORS), generator=g)
        rows = torch.arange(0, count, 4)
        columns = torch.randint(0, len(scenes.PROPERTIES), (len(rows),), generator=g)
        u[rows, columns] = 0.5 + scenes.GAP_SHARE * (torch.rand(len(rows), generator=g) - 0.5)
        return u.to(self.device)

    def _render(self, u: Tensor) -> Tensor:
        """Scenes whose sun stands anywhere in the sky: it must not tell where the horizon is."""
        a = scenes.attributes(u)
        a["sun_y"] = (0.1 + 0.8 * torch.rand(len(u), generator=self.generator)).to(u)
        return scenes.draw(a)

    def next(self, count: int = SCENES) -> tuple[Tensor, Tensor, Tensor]:
        """(pictures [B, 3, 64, 64] in about 0..1, u [B, 8], ruined [B])"""
        g = self.generator
        u, images = self.undisturbed(count)
        ruined = torch.arange(count, device=self.device) < count * 7 // 16
        for row in range(int(ruined.sum())):
            images[row:row + 1] = self.pick(SUBTLE if row % 2 else RUINS)(images[row:row + 1], g)
        self.disturb(images, 3 / 4, 2)
        return images, u, ruined

    def undisturbed(self, count: int) -> tuple[Tensor, Tensor]:
        """(u [B, 8], scenes [B, 3, 64, 64]), every second one out of the pool, if there is one."""
        u = self._factors(count)
        images = self._render(u)
        if self.pool is not None:
            rows = torch.randint(0, len(self.pool[0]), (count // 2,), generator=self.generator).to(self.device)
            u[1::2], images[1::2] = self.pool[0][rows], self.pool[1][rows]
        return u, images

    def known_pool(self) -> tuple[dict[str, Tensor], Tensor]:
        """(measures, pictures [N, 3, 64, 64]) of what came through the generator."""
        factors, images = self.pool
        return scenes.attributes(factors), images

    def disturb(self, images: Tensor, share: float, most: int) -> None:
        """Disturb ``share`` of the pictures in place, four alike, each 1 to ``most`` times."""
        g, fours = self.generator, len(images) // 4
        for part in torch.randperm(len(images), generator=g).split(4)[: int(fours * share)]:
            for _ in range(int(torch.randint(1, most + 1, (), generator=g))):
                images[part] = self.pick(DISTURBANCES)(images[part], g)


def _loss(model: nn.Module, prompts: Prompts, batch: tuple[Tensor, Tensor, Tensor], asked: Tensor,
          ids: dict[str, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy against the graded answer and the end of the turn; also the log-odds and what was wanted [B, Q]."""
    images, u, ruined = batch
    odds = wanted_odds(u, prompts.side[asked], ruined)
    last = prompts.last[asked]
    spoken = torch.where(odds > 0, ids["yes"], ids["no"])
    tokens = prompts.tokens[asked].scatter(2, last[..., None] + 1, spoken[..., None])
    logits = answer_logits(model, images, tokens, torch.stack((last, last + 1), -1)).float()
    answer = logits[:, :, 0].log_softmax(-1)
    yes = torch.sigmoid(odds)
    graded = -(yes * answer[..., ids["yes"]] + (1 - yes) * answer[..., ids["no"]]).mean()
    stop = nn.functional.cross_entropy(logits[:, :, 1].flatten(0, 1), torch.full_like(last.flatten(), ids["end"]))
    answer_odds = answer[..., ids["yes"]] - answer[..., ids["no"]]
    slope = nn.functional.smooth_l1_loss(answer_odds, odds)  # cross-entropy alone leaves sure answers flat
    return graded + SLOPE * slope + 0.1 * stop, answer_odds, odds


def attacked(model: nn.Module, prompts: Prompts, batch: tuple[Tensor, Tensor, Tensor], asked: Tensor,
             ids: dict[str, int], generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The batch with half of its pictures moved where the judge errs most, by an L2 distance of 0 to `ATTACK`."""
    images, u, ruined = batch

    def loss(moved: Tensor, rows: Tensor) -> Tensor:
        return _loss(model, prompts, (moved, u[rows], ruined[rows]), asked[rows], ids)[0]

    return moved_where_it_errs(images, loss, ATTACK, generator), u, ruined


def moved_where_it_errs(images: Tensor, loss: Callable[[Tensor, Tensor], Tensor], most: float,
                        generator: torch.Generator) -> Tensor:
    """Pictures [B, 3, S, S], half of them moved where ``loss`` (of pictures and their rows) grows most, by an L2
    distance of 0 to ``most``.

    A judge that holds out against this (Madry et al., arXiv 1706.06083) has gradients that move a picture as a whole; a
    second sun is an L2 distance of 4, a horizon moved by 10 px one of 13.
    """
    rows = torch.randperm(len(images), generator=generator)[: len(images) // 2].to(images.device)
    moved = images[rows].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(moved, rows), moved)
    length = most * torch.rand(len(moved), 1, 1, 1, generator=generator).to(images)
    step = length * gradient / gradient.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None, None]
    images = images.clone()
    images[rows] = (images[rows] + step).clamp(0, 1)
    return images


def learn_to_look(model: nn.Module, pictures: Pictures, steps: int) -> None:
    """Teach the vision tower to measure scenes, read out by a linear layer that is then thrown away.

    Opposite wordings cancel out for a model that sees nothing yet; after this, language has something to name.
    """
    names = len(scenes.PROPERTIES)
    width = model.config.text_config.hidden_size * IMAGE_TOKENS
    head = nn.Linear(width, names + 1).to(pictures.device)
    parameters = [*model.model.vision_model.parameters(), *model.model.connector.parameters(), *head.parameters()]
    optimiser = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.02)
    every = torch.cat((torch.eye(names), torch.zeros(1, names)))[None].to(pictures.device)
    for step in range(steps):
        images, u, ruined = pictures.next(2 * SCENES)
        wanted = wanted_odds(u, every.expand(len(u), -1, -1), torch.zeros_like(ruined))
        wanted[:, -1] = torch.where(ruined, RUIN_ODDS, FULL_ODDS)
        with torch.autocast(pictures.device, torch.bfloat16):
            odds = head(image_features(model, images).flatten(1)).float()
        loss = nn.functional.binary_cross_entropy_with_logits(odds, torch.sigmoid(wanted), reduction="none")
        counted = torch.cat(((~ruined)[:, None].expand(-1, names), torch.ones_like(ruined)[:, None]), 1)
        descend((loss * counted).sum() / counted.sum(), parameters, optimiser, learning_rate(step, steps, PEAK_RATE))
        if step % 100 == 0:
            right = (((odds > 0) == (wanted > 0)) & counted).sum(0) / counted.sum(0)
            log.info("look %d/%d right %s", step, steps, [round(r, 3) for r in right.tolist()])


def answer_ids(processor: Any) -> dict[str, int]:
    """The single tokens " Yes", " No" and the end of the turn."""
    yes, no = (processor.tokenizer.encode(f" {word}", add_special_tokens=False) for word in ANSWERS)
    if len(yes) != 1 or len(no) != 1:
        raise ValueError(f"the tokenizer splits the answers: {yes}, {no}; let it learn more words")
    return {"yes": yes[0], "no": no[0], "end": processor.tokenizer.eos_token_id}


def train_judge(folder: Path, device: str, look_steps: int = LOOK_STEPS, steps: int = STEPS) -> dict[str, float]:
    """Train a judge from scratch and write it to ``folder``."""
    torch.manual_seed(7)
    start = time.time()
    processor, pictures = new_processor(), Pictures(7, device)
    model = new_model(processor).to(device).train()
    learn_to_look(model, pictures, look_steps)
    learn_to_answer(model, processor, pictures, folder, steps)
    return {"seconds": time.time() - start, "parameters": sum(p.numel() for p in model.parameters())}


def learn_to_answer(model: nn.Module, processor: Any, pictures: Pictures, folder: Path, steps: int,
                    finish: bool = False) -> None:
    """Train the whole model on questions; writes its averaged weights to ``folder`` every now and then.

    ``finish``: it already answers; all wordings from the start, at half the learning rate, under attack.
    """
    device = pictures.device
    prompts, ids = Prompts(processor, device), answer_ids(processor)
    parameters = list(model.parameters())
    average = Average(model, 0.998)
    optimiser = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.02)
    start = time.time()
    for step in range(steps):
        weights = prompts.weights(1.0 if finish else step / steps)
        asked = torch.multinomial(weights, SCENES * ASKED, True, generator=pictures.generator).view(SCENES, ASKED)
        batch = pictures.next()
        with torch.autocast(device, torch.bfloat16):
            if finish:
                batch = attacked(model, prompts, batch, asked.to(device), ids, pictures.generator)
            loss, odds, wanted = _loss(model, prompts, batch, asked.to(device), ids)
        descend(loss, parameters, optimiser, learning_rate(step, steps, PEAK_RATE * (0.5 if finish else 1)))
        average.update(model)
        if step % 100 == 0:
            right = ((odds > 0) == (wanted > 0)).float().mean()
            log.info("judge %d/%d loss %.3f right %.3f %.0f s",
                     step, steps, loss.item(), right.item(), time.time() - start)
        if step % 500 == 499 or step == steps - 1:
            _save_average(average, processor, model, folder)


def _save_average(average: Average, processor: Any, model: nn.Module, folder: Path) -> None:
    """Save the averaged weights; ``model`` keeps its own."""
    averaged = new_model(processor)
    average.copy_to(averaged)
    save_judge(averaged.to(model.dtype), processor, folder)


def finish_judge(first: Path, folder: Path, student: Path, vae: nn.Module, device: str,
                 steps: int = FINISH_STEPS, pool: int = POOL) -> dict[str, float]:
    """Go on with the judge in ``first``, half of the scenes now seen through the student in folder ``student``."""
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(13)
    start = time.time()
    pictures = Pictures(13, device, half_denoised(Student(student, device), vae, pool, seed=11))
    model = AutoModelForImageTextToText.from_pretrained(first, dtype=torch.float32).to(device).train()
    learn_to_answer(model, new_processor(), pictures, folder, steps, finish=True)
    sharpened = sharpen(folder, device)
    return {"seconds": time.time() - start, "sharpened": sharpened}


def main_odds(model: nn.Module, prompts: Prompts, ids: dict[str, int], images: Tensor) -> Tensor:
    """Log-odds of Yes [B, 9] for the main wordings (see `Prompts.main`) about pictures in 0..1 [B, 3, S, S]."""
    return odds_of_yes(model, prompts, ids, images, prompts.main().to(images.device).expand(len(images), -1))


def odds_of_yes(model: nn.Module, prompts: Texts, ids: dict[str, int], images: Tensor, asked: Tensor) -> Tensor:
    """Log-odds of Yes [B, Q] for rows of prompts ``asked`` [B, Q] about pictures as in `answer_logits`."""
    logits = answer_logits(model, images, prompts.tokens[asked], prompts.last[asked][..., None])[:, :, 0]
    return logits[..., ids["yes"]] - logits[..., ids["no"]]


@torch.no_grad()
def sharpen(folder: Path, device: str) -> float:
    """Scale the logits of the judge in ``folder`` so that its log-odds about clean scenes are the wanted ones in the
    least-squares sense: training under attack leaves it timid. Returns the factor (an inverse temperature, Guo et al.,
    arXiv 1706.04599); right and wrong answers stay the same."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    processor = new_processor()
    prompts, ids = Prompts(processor, device), answer_ids(processor)
    u = torch.rand(256, len(scenes.FACTORS), generator=torch.Generator().manual_seed(99)).to(device)
    odds = main_odds(model, prompts, ids, scenes.render(u))
    side = prompts.side[prompts.main().to(device)].expand(len(u), -1, -1)
    wanted = wanted_odds(u, side, torch.zeros(len(u), dtype=torch.bool, device=device))
    factor = ((odds * wanted).sum() / odds.square().sum()).item()
    model.model.text_model.norm.weight.mul_(factor)
    save_judge(model, processor, folder)
    return factor
