"""Which families of vision language models can judge, and how exactly.

    python3 dev.py matrix judges --json judges.json

Every family is built tiny and random, saved, loaded like a user's model and put through the checks in ``CHECKS``.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate

from dual_process.benchmarks.markdown import put_between_marks, table_of
from dual_process.tests import vlm_families
from dual_process.vlm.judge import Judge
from dual_process.vlm.loading import load_judge
from dual_process.vlm.processing import PIXEL_TOLERANCE
from dual_process.vlm.question import Question

SIZES = ((40, 64), (64, 64), (90, 52))
LINE, WARM = "Is the line thick?", "Are the colours of this picture warm?"
LONG = Question(LINE, "maybe definitely")


def picture(size: tuple[int, int] = SIZES[0], seed: int = 0, rows: int = 1) -> Tensor:
    """Smooth random pictures ``[rows, 3, H, W]`` in whole 255ths, kept away from black and white."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(rows, 3, 5, 5, generator=generator)
    smooth = interpolate(coarse, size, mode="bilinear", align_corners=True)
    return ((0.1 + 0.8 * smooth) * 255).round() / 255


def questions(judge: Judge) -> list[Question]:
    """Two questions, both answers, and an answer of several tokens where the family takes one."""
    asked = [Question(LINE), Question(LINE, "No"), Question(WARM), Question(WARM, "No")]
    return asked if refused_answer(judge) else [*asked, LONG]


@lru_cache(maxsize=1)
def refused_answer(judge: Judge) -> str:
    """Why the judge takes no answer of several tokens; empty when it does."""
    try:
        judge.log_likelihood(picture(), [LONG])
    except ValueError as refusal:
        return str(refusal)
    return ""


def pixels(judge: Judge) -> float:
    """Largest difference from what the processor makes of the same picture given as 8-bit PIL image."""
    prompt = judge.prompts.render(LINE, 1)
    worst = 0.0
    for size in SIZES:
        image = picture(size)[0]
        pil = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
        own = judge.processor(images=[[pil]], text=[prompt], return_tensors="pt")
        for key, value in judge.prompts.inputs.pixels([[image]]).items():
            worst = max(worst, (value.float() - own[key].float()).abs().max().item())
    return worst


def gradient(judge: Judge) -> float:
    """Relative error of autograd against central differences along the gradient."""
    asked = [Question(LINE)]
    image = picture().requires_grad_()
    (grad,) = torch.autograd.grad(judge.log_likelihood(image, asked).sum(), image)
    length = grad.norm().item()
    step = 0.02 * grad / length
    with torch.no_grad():
        rise = judge.log_likelihood(image + step, asked) - judge.log_likelihood(image - step, asked)
    return abs(rise.item() / 0.04 / length - 1)


def forward(judge: Judge) -> float:
    """Largest difference from the model's own forward over the templated conversation, answer included."""
    image = picture()
    return max(
        abs(judge.log_likelihood(image, [question]).item() - _by_hand(judge, image, question))
        for question in questions(judge)
    )


@torch.no_grad()
def _by_hand(judge: Judge, image: Tensor, question: Question) -> float:
    processor = judge.processor
    if judge.prompts.template:
        text = judge.prompts.render(question.text, 1)
    else:
        talk = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]},
            {"role": "assistant", "content": [{"type": "text", "text": question.answer}]},
        ]
        text = processor.apply_chat_template(talk)
    bos = processor.tokenizer.bos_token
    pil = Image.new("RGB", image.shape[:1:-1])
    inputs = processor(
        images=[[pil]], text=[text], add_special_tokens=not (bos and text.startswith(bos)), return_tensors="pt"
    )
    inputs = {**inputs, **judge.prompts.inputs.pixels([[image[0]]])}
    inputs.pop("labels", None)
    logp = judge.model(**inputs).logits[0].float().log_softmax(-1)
    ids = inputs["input_ids"][0].tolist()
    if judge.prompts.template:
        return logp[-1, processor.tokenizer.encode(question.answer, add_special_tokens=False)[0]].item()
    for spoken in (question.answer, " " + question.answer):
        answer = processor.tokenizer.encode(spoken, add_special_tokens=False)
        for start in range(len(ids) - len(answer), len(ids) - len(answer) - 4, -1):
            if ids[start : start + len(answer)] == answer:
                return sum(logp[start + i - 1, token].item() for i, token in enumerate(answer)) / len(answer)
    raise ValueError(f"the answer {question.answer} is not at the end of {text!r}")


def together(judge: Judge) -> float:
    """Largest difference between several questions at once and one by one, two pictures each."""
    images, asked = picture(rows=2), questions(judge)
    alone = torch.cat([judge.log_likelihood(images, [question]) for question in asked], dim=1)
    return (judge.log_likelihood(images, asked) - alone).abs().max().item()


def cosine(judge: Judge) -> float:
    """1 - cosine between the image gradients of several questions at once and one by one."""
    images, asked = picture(rows=2).requires_grad_(), questions(judge)
    (at_once,) = torch.autograd.grad(judge.log_likelihood(images, asked).sum(), images)
    alone = sum(torch.autograd.grad(judge.log_likelihood(images, [q]).sum(), images)[0] for q in asked)
    return 1 - cosine_similarity(at_once.double().flatten(), alone.double().flatten(), dim=0).item()


def batch(judge: Judge) -> float:
    """Largest difference between two pictures in one batch and each by itself."""
    images, asked = picture(rows=2), questions(judge)
    alone = torch.cat([judge.log_likelihood(image[None], asked) for image in images])
    return (judge.log_likelihood(images, asked) - alone).abs().max().item()


def frozen(judge: Judge) -> float:
    """How many parameters of the judge want or got a gradient in a backward pass."""
    image = picture().requires_grad_()
    judge.log_likelihood(image, questions(judge)).sum().backward()
    return sum(parameter.requires_grad or parameter.grad is not None for parameter in judge.model.parameters())


CHECKS: dict[str, tuple[Callable[[Judge], float], float]] = {
    "pixels": (pixels, PIXEL_TOLERANCE),
    "gradient": (gradient, 0.01),
    "forward": (forward, 1e-4),
    "together": (together, 1e-4),
    "cosine": (cosine, 1e-4),
    "batch": (batch, 1e-4),
    "frozen": (frozen, 0),
}


def examine(name: str, folder: Path) -> dict:
    """Build a family in ``folder``, load it and run every check; a refusal is reported with its sentence."""
    row = {"name": name, "class": None, "checks": {}, "ok": False, "why": "", "one_look": None}
    row["transformers"] = transformers.__version__
    try:
        model, processor = vlm_families.build(name)
        row["class"] = type(model).__name__
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        judge = load_judge(folder, template=vlm_families.TEMPLATES.get(name, ""))
    except (ValueError, ImportError, AttributeError) as refusal:
        row["why"] = str(refusal)
        return row
    for check, (measure, bar) in CHECKS.items():
        value = measure(judge)
        row["checks"][check] = {"value": value, "bar": bar, "ok": value <= bar}
    row["one_look"] = judge.look.shares
    failed = [check for check, result in row["checks"].items() if not result["ok"]]
    row["ok"] = not failed
    row["why"] = f"failed: {', '.join(failed)}" if failed else refused_answer(judge)
    return row


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table, one column for each version of transformers among them."""
    versions = sorted({row["transformers"] for row in rows}, reverse=True)
    heads = ["family", "class", *(f"transformers {version}" for version in versions), "one look", "note"]
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows):
        ran = {row["transformers"]: row for row in rows if row["name"] == name}
        kind = next((f"`{row['class']}`" for row in ran.values() if row["class"]), "-")
        works = [("yes" if ran[version]["ok"] else "no") if version in ran else "-" for version in versions]
        look = "yes" if any(row["one_look"] for row in ran.values()) else "no"
        notes = dict.fromkeys(row["why"] for row in ran.values() if row["why"])
        lines.append([name, kind, *works, look, " ".join(notes)])
    return table_of(heads, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write one row per family to this file")
    parser.add_argument("--only", nargs="*", default=list(vlm_families.FAMILIES), help="families to examine")
    parser.add_argument("--also", type=Path, nargs="*", default=[], help="rows of runs on other transformers versions")
    parser.add_argument("--readme", type=Path, help="write the table between the marks in this file")
    arguments = parser.parse_args()
    logging.getLogger("dual_process").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        rows = [examine(name, Path(scratch) / name.replace(" ", "_")) for name in arguments.only]
    print(f"{sum(row['ok'] for row in rows)} of {len(rows)} families on transformers {transformers.__version__}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    rows += [row for other in arguments.also for row in json.loads(other.read_text(encoding="utf-8"))]
    print(table(rows))
    if arguments.readme:
        put_between_marks(arguments.readme, "judges", table(rows))


if __name__ == "__main__":
    main()
