"""The bundled models as a user gets them: stock loader, stock sampler, transformers' own Auto classes."""

from pathlib import Path

import pytest
import torch

from dual_process.tiny import oracles, scenes
from dual_process.tiny.pictures import DISTURBANCES, RUINS
from dual_process.tiny.questions import KEEP_QUESTION, QUESTIONS

TINY = Path(oracles.__file__).parent
CHECKPOINT = TINY / "models" / "dual_process_tiny.safetensors"
COUNT = 64


@pytest.fixture(scope="module")
def student(comfy):
    """(MODEL, CLIP, VAE) as the stock loader and our text encoder give them."""
    import comfy.sd

    from dual_process.tiny.text_encoder import load_tiny_clip

    model, _, vae = comfy.sd.load_checkpoint_guess_config(str(CHECKPOINT), output_clip=False)[:3]
    return model, load_tiny_clip(), vae


def draw(student, prompt, steps=4, count=COUNT, seed=0, **part):
    import nodes

    model, clip, vae = student
    positive = nodes.CLIPTextEncode().encode(clip, prompt)[0]
    latent = {"samples": torch.zeros(count, 16, 8, 8)}
    with torch.inference_mode():
        drawn = nodes.common_ksampler(model, seed, steps, 1.0, "euler", "simple", positive, positive, latent, **part)[0]
        return nodes.VAEDecode().decode(vae, drawn)[0].movedim(-1, 1)


def test_all_files_together_are_small():
    files = [file for folder in ("models", "prompt_encoder", "judge*") for file in TINY.glob(f"{folder}/*")]
    assert sum(file.stat().st_size for file in files) <= 24e6
    assert not [file.name for file in files if file.suffix in (".bin", ".pt", ".ckpt", ".pkl")]


def test_free_prompt_is_readable_and_undecided(student):
    images = draw(student, scenes.prompt_for({}))
    assert oracles.measure(images)["readable"].float().mean() >= 0.95
    for name in scenes.PROPERTIES:
        assert 0.3 <= oracles.holds(images, name).float().mean() <= 0.7, name


@pytest.mark.parametrize("name", scenes.PROPERTIES)
@pytest.mark.parametrize("value", (False, True))
def test_prompt_is_obeyed(student, name, value):
    images = draw(student, scenes.prompt_for({name: value}), count=48, seed=1)
    assert oracles.holds(images, name, "Yes" if value else "No").float().mean() >= 0.93


def test_vae_round_trip_through_stock_nodes(student):
    import nodes

    images = scenes.render(torch.rand(16, 8, generator=torch.Generator().manual_seed(4)))
    with torch.inference_mode():
        latent = nodes.VAEEncode().encode(student[2], images.movedim(1, -1))[0]
        back = nodes.VAEDecode().decode(student[2], latent)[0].movedim(-1, 1)
    assert latent["samples"].shape == (16, 16, 8, 8)
    assert (back - images).square().mean() < 10**-3.3


def test_text_encoder_understands_weights_and_nothing(student):
    import nodes

    def encode(text):
        ((context, extra),) = nodes.CLIPTextEncode().encode(student[1], text)[0]
        return context, extra["pooled_output"]

    context, pooled = encode("a warm landscape")
    heavier, heavier_pooled = encode("a (warm:1.5) landscape")
    assert torch.allclose(heavier[:, 1], context[:, 1] * 1.5) and torch.allclose(heavier[:, 2], context[:, 2])
    assert not torch.allclose(pooled, heavier_pooled)
    assert encode("")[0].shape == context.shape == (1, 16, 64) and not encode("")[1].any()
    assert torch.equal(encode("a warm, unheard-of landscape!")[1], encode("a warm of landscape")[1])


@pytest.fixture(scope="module")
def judge():
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(TINY / "judge", dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(TINY / "judge")


def answers(judge, images, question):
    """Which of the pictures get "Yes", through the processor and the model's own forward."""
    model, processor = judge
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(
        text=[prompt] * len(images), images=[[image] for image in images], do_rescale=False, return_tensors="pt"
    )
    yes, no = (processor.tokenizer.encode(word, add_special_tokens=False)[0] for word in (" Yes", " No"))
    with torch.no_grad():
        logits = model(**inputs, logits_to_keep=1).logits[:, -1]
    return logits[:, yes] > logits[:, no]


def scenes_disturbed_by(disturb):
    g = torch.Generator().manual_seed(6)
    u = torch.rand(COUNT, 8, generator=g)
    return u, disturb(scenes.render(u), g)


@pytest.mark.parametrize("disturb", [lambda images, g: images, *DISTURBANCES.values()], ids=["clean", *DISTURBANCES])
def test_judge_answers_both_wordings(judge, disturb):
    u, images = scenes_disturbed_by(disturb)
    clear = (2 * u[:, :4] - 1).abs() > scenes.GAP_SHARE
    for j, name in enumerate(scenes.PROPERTIES):
        for question, wanted in zip(QUESTIONS[name], (u[:, j] > 0.5, u[:, j] < 0.5), strict=True):
            right = (answers(judge, images, question) == wanted)[clear[:, j]]
            assert right.float().mean() >= 0.97, question
    assert answers(judge, images, KEEP_QUESTION).float().mean() >= 0.97


@pytest.mark.parametrize("steps", (1, 2))
def test_judge_reads_half_denoised_pictures(student, judge, steps):
    """What x0 looks like early in the schedule."""
    for name in scenes.PROPERTIES:
        for value, question in zip((True, False), QUESTIONS[name], strict=True):
            prompt = scenes.prompt_for({name: value})
            images = draw(student, prompt, count=16, last_step=steps, force_full_denoise=True)
            assert answers(judge, images, question).float().mean() >= 0.93, question


@pytest.mark.parametrize("ruin, seldom", [("ladder", 0.02), ("near_black", 0.02), ("blobs", 0.1), ("bands", 0.08)])
def test_judge_seldom_says_yes_to_ruins(judge, ruin, seldom):
    """Large ruins; of small ones it takes many for scenes (tiny/models/report.json)."""
    _, images = scenes_disturbed_by(lambda images, g: torch.cat([RUINS[ruin](part, g) for part in images.split(8)]))
    for question in [question for pair in QUESTIONS.values() for question in pair] + [KEEP_QUESTION]:
        assert answers(judge, images, question).float().mean() <= seldom, question


def test_judge_speaks_and_stops(judge):
    model, processor = judge
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": KEEP_QUESTION}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    picture = (scenes.render(torch.full((1, 8), 0.8))[0] * 255).round().to(torch.uint8)
    inputs = processor(text=prompt, images=[picture], return_tensors="pt")
    spoken = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    assert processor.batch_decode(spoken) == [" Yes<end_of_utterance>"]
