"""`python3 dev.py templates`: write the example workflows, for the bundled tiny models and for real ones.

What they teach and with which models is in lessons.py. Edit, run the command, look at the result in ComfyUI and commit
the JSON. `--run` presses Run on the tiny versions, or on those that are named, and makes their thumbnails from what
comes out.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from .client import ComfyClient
from .comfyui import ComfyServer
from .lessons import Lesson, Models, file_name, lessons
from .sheet import Out, Sheet
from .thumbnails import pairs, ranking, sketch
from .workflow import FOLDER, nodes_of, to_api

LONGEST = 3600  # s that one may run
TO_DRAW = "Prompt to draw"
TINY_NAMES = {lesson.name for lesson, models in lessons() if not models.checkpoint_from}
BLUE, GREEN, RED, VIOLET, ORANGE = "#3f789e", "#8A8", "#a33", "#a1309b", "#b06634"


def templates(object_info: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and content of every template; `object_info` is the server's answer to /object_info."""
    for lesson, models in lessons():
        lay_out = pick if not lesson.file else teach
        yield file_name(lesson, models), lay_out(Sheet(object_info), lesson, models)


def teach(sheet: Sheet, lesson: Lesson, models: Models) -> dict[str, Any]:
    """A template with the trainer, drawing the same seed without and with what was learned."""
    note = training_note(lesson, models)
    model, vae, prompt, to_draw, latent = image_model(sheet, lesson, models, models.batch, note)
    guide, wording = guide_of(sheet, lesson, models) if lesson.guide else (None, None)
    judge, questions = judge_and_questions(sheet, lesson, models, guide, wording)
    sheet.group("Teach", VIOLET, 400)
    trainer = sheet.add(
        "DualProcessTrainer",
        model=model,
        vae=vae,
        positive=prompt,
        latent=latent,
        judge=judge,
        questions=questions,
        **models.training | lesson.training,
    )
    lora = Out(trainer, 0)
    sheet.group("Use it: the same seed before and after", ORANGE, 320)
    kept = sheet.add("DualProcessSaveLoRA", "Keep it", lora=lora, filename_prefix=f"dual_process/{lesson.file}")
    before = shown_with(sheet, models, model, vae, to_draw, latent, "Draw without it", "Before")
    if guide:
        compared = {"reference": before} if lesson.guide == "DualProcessBeforeAfterGuide" else {}
        sheet.add("DualProcessSeenByJudge", images=before, questions=questions, judge=judge, **compared)
    sheet.column(320)
    taught = sheet.add("DualProcessApplyLoRA", "Use what was learned", model=model, lora=lora)
    sheet.leave(sheet.height(kept) - sheet.height(taught))
    shown_with(sheet, models, Out(taught, 0), vae, to_draw, latent, "Draw with it", "After, the same seed")
    return sheet.saved()


def pick(sheet: Sheet, lesson: Lesson, models: Models) -> dict[str, Any]:
    """A template without training: the judge sorts a batch."""
    batch = max(models.batch, 8)
    model, vae, prompt, _, latent = image_model(sheet, lesson, models, batch, picking_note(lesson, models))
    judge, questions = judge_and_questions(sheet, lesson, models)
    sheet.group("Draw and sort", VIOLET, 400)
    pictures = drawn(sheet, model, vae, prompt, latent, f"Draw {batch} pictures")
    score = sheet.add("DualProcessJudgeScore", judge=judge, images=pictures, questions=questions)
    sheet.group("Look", ORANGE, 400)
    sheet.add("PreviewImage", "The best", images=enlarged(sheet, models, Out(score, 0)))
    sheet.add("PreviewImage", "All, best first", images=enlarged(sheet, models, Out(score, 1)))
    return sheet.saved()


def image_model(sheet: Sheet, lesson: Lesson, models: Models, batch: int, note: str) -> tuple[Out, ...]:
    """The first group; gives model, VAE, prompt, the prompt to draw what was taught with, and latent."""
    sheet.group("The image model", BLUE, 340)
    loader = sheet.add(
        "CheckpointLoaderSimple",
        "Image model",
        downloads_of(models),
        ckpt_name=models.checkpoint,
    )
    clip = Out(loader, 1) if models.checkpoint_from else Out(sheet.add("DualProcessTinyTextEncoder"), 0)
    prompt = sheet.add("CLIPTextEncode", "Prompt", clip=clip, text=lesson.prompt)
    to_draw = sheet.add("CLIPTextEncode", TO_DRAW, clip=clip, text=lesson.prompt) if lesson.file else prompt
    latent = sheet.add(models.latent, "Picture size", width=models.size, height=models.size, batch_size=batch)
    sheet.note(note)
    return Out(loader, 0), Out(loader, 2), Out(prompt, 0), Out(to_draw, 0), Out(latent, 0)


def guide_of(sheet: Sheet, lesson: Lesson, models: Models) -> tuple[Out, Out]:
    """The group with the guide; gives the guide and its wording."""
    sheet.group("The guide", RED, 340)
    mask = {}
    if lesson.guide == "DualProcessCompositionGuide":
        x, y, width, height = (round(share * models.size) for share in lesson.area)
        paper = sheet.add("SolidMask", "Whole picture", value=0.0, width=models.size, height=models.size)
        area = sheet.add("SolidMask", "Area", value=1.0, width=width, height=height)
        both = sheet.add(
            "MaskComposite",
            "Area in the picture",
            destination=Out(paper, 0),
            source=Out(area, 0),
            operation="add",
            x=x,
            y=y,
        )
        mask = {"mask": Out(both, 0)}
    guide = sheet.add(lesson.guide, **lesson.guide_values, **mask)
    return Out(guide, 0), Out(guide, 1 if lesson.guide == "DualProcessBeforeAfterGuide" else 2)


def judge_and_questions(
    sheet: Sheet, lesson: Lesson, models: Models, guide: Out | None = None, wording: Out | None = None
) -> tuple[Out, Out]:
    """The group with the judge and the chain of questions; what has to stay is asked last."""
    sheet.group("The judge", GREEN, 360)
    judge = sheet.add("DualProcessJudgeLoader", "Judge", judge=models.judge)
    asked = lesson.questions or ((wording, "Yes"),)
    chain = {}
    for text, answer in asked:
        shown = {"guide": guide} if guide else {}
        question = sheet.add(
            "DualProcessQuestion", "What the judge is asked", text=text, answer=answer, **chain, **shown
        )
        chain = {"questions": Out(question, 0)}
    last = {"title": "What has to stay", "keep": True} if lesson.file else {"title": "What else it is asked"}
    question = sheet.add("DualProcessQuestion", text=lesson.keep, **last, **chain)
    return Out(judge, 0), Out(question, 0)


def drawn(sheet: Sheet, model: Out, vae: Out, prompt: Out, latent: Out, title: str) -> Out:
    """Nodes that draw pictures as the trainer does."""
    sampler = sheet.add(
        "KSampler",
        title,
        model=model,
        positive=prompt,
        negative=prompt,
        latent_image=latent,
        seed=1234,
        steps=4,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
    )
    return Out(sheet.add("VAEDecode", samples=Out(sampler, 0), vae=vae), 0)


def enlarged(sheet: Sheet, models: Models, pictures: Out) -> Out:
    """The pictures large enough to be looked at."""
    if models.enlarge == 1:
        return pictures
    scaled = {"upscale_method": "bicubic", "scale_by": float(models.enlarge)}
    return Out(sheet.add("ImageScaleBy", "Larger, to look at", image=pictures, **scaled), 0)


def shown_with(sheet, models, model, vae, prompt, latent, drawing: str, title: str) -> Out:
    """Nodes that draw pictures, which it gives, and show them."""
    pictures = drawn(sheet, model, vae, prompt, latent, drawing)
    sheet.add("PreviewImage", title, images=enlarged(sheet, models, pictures))
    return pictures


def downloads_of(models: Models) -> tuple[dict[str, str], ...]:
    """What the front end offers to download."""
    if not models.checkpoint_from:
        return ()
    url = f"https://huggingface.co/{models.checkpoint_from}/resolve/main/{models.checkpoint}"
    return ({"name": models.checkpoint, "url": url, "directory": "checkpoints"},)


def training_note(lesson: Lesson, models: Models) -> str:
    """What the user should know before pressing Run."""
    steps = ["Press **Run**, and watch the pictures and the judge's answers on the trainer."]
    steps += ["Compare **Before** and **After**: the same seed, without and with the LoRA."]
    steps += [f"Write other prompts into *{TO_DRAW}*. Whatever leads into the trainer makes it train anew."]
    steps += [lesson.try_this]
    if lesson.guide:
        same = " (before training both are the same)" if lesson.guide == "DualProcessBeforeAfterGuide" else ""
        look = f"To see first what the judge is shown{same}: select *Seen by the Judge*, at the bottom of group 5, "
        steps.insert(0, look + "and press the play button above it.")
    if not models.checkpoint_from:
        return (
            f"**{lesson.name}** - runs on any machine, also without a GPU, with the pack's own tiny models.\n\n"
            f"{lesson.about}\n\n{numbered(steps)}\n\n{models.knows}\n"
        )
    return (
        f"**{lesson.name}**\n\n{lesson.about}\n\n{numbered([*what_to_download(models), *steps])}\n\n"
        "**Not measured:** nobody has made a result with these weights yet. Steps and rank are the paper's, the "
        "learning rate moves layers about as far in a step, and the rest is near what did well with the tiny models."
        f"{twin(lesson, 'prompt, questions and guide, picture size and number, and the settings of the trainer')}\n"
    )


def picking_note(lesson: Lesson, models: Models) -> str:
    """The same for a template without training."""
    steps = ["Press **Run**. *Judge Score* shows the best picture and a table of all.", lesson.try_this]
    if not models.checkpoint_from:
        return (
            f"**{lesson.name}** - no training; runs on any machine, also without a GPU.\n\n"
            f"{lesson.about}\n\n{numbered(steps)}\n\n{models.knows}\n"
        )
    return (
        f"**{lesson.name}** - no training.\n\n"
        f"{lesson.about}\n\n{numbered([*what_to_download(models), *steps])}\n\n"
        "**Not measured:** how well this judge sorts has not been looked at."
        f"{twin(lesson, 'prompt, questions, picture size and number')}\n"
    )


def twin(lesson: Lesson, differs: str) -> str:
    """Which template is the same with tiny models, if there is one."""
    if lesson.name not in TINY_NAMES:
        return ""
    return f"\n\n*{lesson.name}*, the version with tiny models, has the same nodes, but other loaders, {differs}."


def what_to_download(models: Models) -> list[str]:
    """The first two steps with real models."""
    return [
        f"Image model: `{models.checkpoint}` (with CLIP and VAE in it) into `models/checkpoints`; ComfyUI offers the "
        "download.",
        "Judge: a folder inside `models/VLM`. In ComfyUI's folder:\n"
        f"```\nhf download {models.judge_from} --local-dir models/VLM/{models.judge}\n```\n"
        f"   then press **R**. (Or put `{models.judge_from}` into *hub_id* and tick *download*.)",
    ]


def numbered(steps: list[str]) -> str:
    """A numbered list in Markdown."""
    return "\n".join(f"{number}. {step}" for number, step in enumerate(steps, 1))


def results(client: ComfyClient, workflow: dict[str, Any], object_info: dict[str, Any]) -> list[list[Image.Image]]:
    """Run a workflow; the pictures of each of its previews, in the order of the sheet."""
    graph = to_api(workflow, object_info)
    shown = client.run(graph, timeout=LONGEST)
    return [
        [Image.open(io.BytesIO(client.picture(picture))) for picture in shown[node]["images"]]
        for node in nodes_of(graph, "PreviewImage")
    ]


def main() -> None:
    """Write all templates, the sketches of those for real models and, with --run, thumbnails of tiny ones."""
    parser = argparse.ArgumentParser(prog="dev.py templates", description=main.__doc__)
    tiny = {file_name(lesson, models): lesson for lesson, models in lessons() if not models.checkpoint_from}
    parser.add_argument("--run", nargs="*", choices=tiny, help="run these tiny ones (all, if none is named)")
    run = parser.parse_args().run
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        with ComfyServer(base, base / "comfyui.log") as server, ComfyClient(server.url) as client:
            object_info = client.get_json("/object_info")
            written = dict(templates(object_info))
            for name, content in written.items():
                text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
                (FOLDER / f"{name}.json").write_text(text, encoding="utf-8")
            for lesson, models in lessons():
                if models.checkpoint_from:
                    save_thumbnail(sketch(lesson.name, models.label), file_name(lesson, models))
            for name in [] if run is None else run or tiny:
                print(f"running '{name}'", flush=True)
                first, second = results(client, written[name], object_info)
                lesson = tiny[name]
                save_thumbnail(pairs(first, second, lesson.holds) if lesson.file else ranking(second), name)


def save_thumbnail(picture: Image.Image, name: str) -> None:
    """Put a template's thumbnail beside it."""
    picture.save(FOLDER / f"{name}.jpg", quality=88)


if __name__ == "__main__":
    main()
