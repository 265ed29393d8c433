"""What the templates teach, and with which models: the tables that templates.py lays out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from ..tiny.questions import HIGHER, KEEP_QUESTION, QUESTIONS, SUFFIX, THICKER


@dataclass(frozen=True)
class Models:
    """Which models a template loads, and the settings that belong to them."""

    label: str  # in the template's name
    checkpoint: str
    judge: str
    size: int
    batch: int
    latent: str = "EmptySD3LatentImage"
    checkpoint_from: str = ""  # repository on the Hugging Face Hub; empty: bundled
    judge_from: str = ""
    training: dict[str, Any] = field(default_factory=dict)  # what the trainer has other than its defaults
    enlarge: int = 1  # times, to look at
    knows: str = ""  # what the judge can be asked, where that is all


@dataclass(frozen=True)
class Lesson:
    """What a template teaches, or picks out of a batch."""

    name: str
    file: str  # of the LoRA
    about: str
    prompt: str
    keep: str
    questions: tuple[tuple[str, str], ...] = ()  # text and wanted answer
    guide: str = ""  # node type; its wording is the question then
    guide_values: dict[str, Any] = field(default_factory=dict)
    area: tuple[float, ...] = (1 / 16, 7 / 16, 1 / 2, 1 / 2)  # of Composition Guide: x, y, width and height
    try_this: str = ""
    training: dict[str, Any] = field(default_factory=dict)  # as in Models, and counts more
    # what tiny.oracles has to find: property -> answer; empty where it depends on the picture before
    holds: dict[str, str] = field(default_factory=dict)


TINY = Models(
    "",
    "dual_process_tiny.safetensors",
    "tiny judge (bundled)",
    64,
    16,
    enlarge=4,
    training={"steps": 180, "learning_rate": 0.003, "rank": 8, "check_every": 10},
    knows="The tiny judge knows whether the horizon is in the upper half, the colours are warm, the lines are thick, "
    "and the white ball is in front of the green one.",
)
TINY_GUIDED = replace(
    TINY,
    judge="tiny judge that reads guides (bundled)",
    training=TINY.training | {"learning_rate": 0.001},  # at three times that, skies had stains
    knows="This tiny judge reads the line of Horizon Guide, the swatches of Palette Guide, the stroke of Line Weight "
    "Guide and the outline of Composition Guide as the area of the sky, with the questions that those nodes word. "
    "Shown a picture before and after, it can be asked about warmer colours, a higher horizon and thicker lines. "
    "Without a guide it answers what the other tiny judge does.",
)
FLUX = Models(
    "FLUX schnell, Qwen2.5-VL",
    "flux1-schnell-fp8.safetensors",
    "Qwen2.5-VL-3B-Instruct",
    512,
    1,
    checkpoint_from="Comfy-Org/flux1-schnell",
    judge_from="Qwen/Qwen2.5-VL-3B-Instruct",
)
TURBO = Models(
    "SDXL-Turbo, SmolVLM",
    "sd_xl_turbo_1.0_fp16.safetensors",
    "SmolVLM-Instruct",
    512,
    1,
    "EmptyLatentImage",
    checkpoint_from="stabilityai/sdxl-turbo",
    judge_from="HuggingFaceTB/SmolVLM-Instruct",
)

# for colours, which change all of the picture and get gaudy where later steps are learned from too
ALL_CHANGES = {"anchor": 0.1, "learn_at": "early steps", "drift_limit": 0.35}
COLOURS = ALL_CHANGES | {"prior": 0.0}  # which it holds back, and skies got stains
# learned late, not by every seed under as much noise as the default has, and at a higher rate other things go along
TINY_COLOURS = COLOURS | {"steps": 300, "learning_rate": 0.001, "judge_noise": 0.05}
TINY_PROMPT = "a landscape with two balls"
OTHER_WAY = "Set the answer to `No` and press Run again: the model is taught the opposite."
TINY_LESSONS = [
    Lesson(
        "Teach the horizon",
        "horizon",
        "The horizon moves into the upper half of the picture.",
        TINY_PROMPT,
        KEEP_QUESTION,
        ((QUESTIONS["horizon"][0], "Yes"),),
        try_this=OTHER_WAY,
        holds={"horizon": "Yes"},
    ),
    Lesson(
        "Teach a palette",
        "palette",
        "The colours of the picture become warm.",
        TINY_PROMPT,
        KEEP_QUESTION,
        ((QUESTIONS["palette"][0], "Yes"),),
        try_this=OTHER_WAY,
        training=TINY_COLOURS,
        holds={"palette": "Yes"},
    ),
    Lesson(
        "Teach line weight",
        "line_weight",
        "The lines of the picture become thick.",
        TINY_PROMPT,
        KEEP_QUESTION,
        ((QUESTIONS["line"][0], "Yes"),),
        try_this=OTHER_WAY,
        holds={"line": "Yes"},
    ),
    Lesson(
        "Teach depth",
        "depth",
        "The white ball comes in front of the green one.",
        TINY_PROMPT,
        KEEP_QUESTION,
        ((QUESTIONS["depth"][0], "Yes"),),
        try_this=OTHER_WAY,
        holds={"depth": "Yes"},
    ),
    Lesson(
        "Teach a composition",
        "composition",
        "Two things at once: a low horizon (the answer *No* to a question) and the white ball in front of the green "
        "one (the answer *Yes* to another). The trainer shows a curve for each question.",
        TINY_PROMPT,
        KEEP_QUESTION,
        ((QUESTIONS["horizon"][0], "No"), (QUESTIONS["depth"][0], "Yes")),
        holds={"horizon": "No", "depth": "Yes"},
        try_this="Swap the two answers, or chain a third question in.",
    ),
    Lesson(
        "Teach common sense",
        "commonsense",
        "Let it be common sense here that what is warm is drawn with thick lines, so that no prompt has to say so: "
        "this one asks for a warm landscape only, and the judge is asked about the lines.",
        "a warm landscape with two balls",
        KEEP_QUESTION,
        ((QUESTIONS["line"][0], "Yes"),),
        try_this="Another pair: the prompt `a landscape with a low horizon` and *Are the colours of the picture warm?* "
        "with the answer `Yes`. Then draw other prompts with the LoRA: it was taught with this one alone.",
        holds={"line": "Yes", "palette": "Yes"},
    ),
]
WITH_A_GUIDE = " with a guide"
# this judge is not as sure about guides as about plain questions, and one wanted height makes pictures alike by itself
FOLLOWING = {"target": 0.9, "stop_at": 0.85, "drift_limit": 0.5, "learn_at": "early steps"}
# an outline hides the line that it asks for, so that the judge does not see its stains
OUTLINED = FOLLOWING | {"prior": 8.0}
TINY_GUIDED_LESSONS = [
    Lesson(
        f"Teach the horizon{WITH_A_GUIDE}",
        "horizon_guide",
        "The horizon moves to the height of the red line of Horizon Guide.",
        TINY_PROMPT,
        KEEP_QUESTION,
        guide="DualProcessHorizonGuide",
        guide_values={"height": 0.6},
        try_this="Move the line with *height*, from 0.2 to 0.8.",
        training=FOLLOWING,
        holds={"horizon": "Yes"},
    ),
    Lesson(
        f"Teach a palette{WITH_A_GUIDE}",
        "palette_guide",
        "The picture takes on the colours of Palette Guide.",
        TINY_PROMPT,
        KEEP_QUESTION,
        guide="DualProcessPaletteGuide",
        guide_values={"colours": "#e7ac8c, #a46852, #2d5d33"},
        try_this="Try cool colours, `#9ebee7, #5b7abf, #285d3a`, or some between, `#c6bebf, #9a879e, #495b51`.",
        training=TINY_COLOURS | FOLLOWING,
        holds={"palette": "Yes"},
    ),
    Lesson(
        f"Teach line weight{WITH_A_GUIDE}",
        "line_weight_guide",
        "The lines become as thick as the stroke of Line Weight Guide.",
        TINY_PROMPT,
        KEEP_QUESTION,
        guide="DualProcessLineWeightGuide",
        guide_values={"pixels": 3.0},
        try_this="Change *pixels*: 1.5 is thin, 4 is thick.",
        training=FOLLOWING,
        holds={"line": "Yes"},
    ),
    Lesson(
        f"Teach a composition{WITH_A_GUIDE}",
        "composition_guide",
        "The sky fills the area that Composition Guide outlines, and no more.",
        TINY_PROMPT,
        KEEP_QUESTION,
        guide="DualProcessCompositionGuide",
        guide_values={"labels": "sky"},
        area=(0, 0, 1, 0.375),
        try_this="Change the *height* of *Area*, from 14 to 50 of the picture's 64 pixels.",
        training=OUTLINED,
        holds={"horizon": "Yes"},
    ),
    Lesson(
        "Compare before and after",
        "higher",
        "The judge is shown two pictures of the same seed, the untaught model's and the present one's, and is asked "
        "how the second differs from the first: every horizon rises from where it was.",
        TINY_PROMPT,
        KEEP_QUESTION,
        guide="DualProcessBeforeAfterGuide",
        guide_values={"question": HIGHER},
        try_this=f"Write another question into *Before/After Guide*: `{THICKER}`",
        training=FOLLOWING,
    ),
]
TINY_BEST = Lesson(
    "Best of N with the judge",
    "",
    "Of 16 pictures, those with a high horizon and the white ball in front come first.",
    TINY_PROMPT,
    KEEP_QUESTION,
    ((QUESTIONS["horizon"][0], "Yes"), (QUESTIONS["depth"][0], "Yes")),
    try_this="Raise *keep* on Judge Score to pick several, or *batch_size* to choose among more.",
)

SPILLED = ("Is the water spilling out of the cup onto the table?" + SUFFIX, "Yes")
SPILLED_PROMPT = "a photo of a cup of water that has tipped over on a wooden table"
SPILLED_KEEP = "Is this a photo of a cup on a table?" + SUFFIX
LESSONS = [
    Lesson(
        f"Teach the horizon{WITH_A_GUIDE}",
        "horizon_guide",
        "The horizon moves to the height of the red line of Horizon Guide.",
        "a photo of a lake in front of distant hills",
        "Is this a photo of a lake?" + SUFFIX,
        guide="DualProcessHorizonGuide",
        try_this="Move the line with *height*.",
        training=FOLLOWING,
    ),
    Lesson(
        f"Teach a palette{WITH_A_GUIDE}",
        "palette_guide",
        "The picture takes on the colours of Palette Guide.",
        "a painting of a street market",
        "Is this a painting of a street market?" + SUFFIX,
        guide="DualProcessPaletteGuide",
        try_this="Type other hex codes, or connect a picture to *reference*.",
        training=COLOURS | FOLLOWING,
    ),
    Lesson(
        f"Teach line weight{WITH_A_GUIDE}",
        "line_weight_guide",
        "The lines become as thick as the stroke of Line Weight Guide.",
        "a line drawing of a house with a garden",
        "Is this a line drawing of a house?" + SUFFIX,
        guide="DualProcessLineWeightGuide",
        try_this="Change *pixels*.",
        training=FOLLOWING,
    ),
    Lesson(
        "Teach depth",
        "depth",
        "The blue chair comes in front of the red one.",
        "a photo of a red chair and a blue chair in a garden",
        "Is this a photo of two chairs in a garden?" + SUFFIX,
        (("Is the blue chair in front of the red chair?" + SUFFIX, "Yes"),),
        try_this=OTHER_WAY,
    ),
    Lesson(
        f"Teach depth{WITH_A_GUIDE}",
        "depth_guide",
        "What is at point B comes to the front, what is at point A goes to the back.",
        "a photo of two wooden chairs in a garden",
        "Is this a photo of two chairs in a garden?" + SUFFIX,
        guide="DualProcessDepthGuide",
        try_this="Move the points.",
        training=FOLLOWING | {"learn_at": "any step"},
    ),
    Lesson(
        f"Teach a composition{WITH_A_GUIDE}",
        "composition_guide",
        "The house moves into the area that Composition Guide outlines.",
        "a photo of a small red house in a wide meadow",
        "Is this a photo of a house in a meadow?" + SUFFIX,
        guide="DualProcessCompositionGuide",
        guide_values={"labels": "house"},
        try_this="Paint your own area: *Load Image*, *Open in MaskEditor*, and connect its mask instead. A batch of "
        "masks makes several areas, with one label per line.",
        training=OUTLINED,
    ),
    Lesson(
        "Teach common sense",
        "commonsense",
        "A cup that has tipped over spills its water.",
        SPILLED_PROMPT,
        SPILLED_KEEP,
        (SPILLED,),
        try_this="Write what your own prompt leaves out as a closed question.",
    ),
    Lesson(
        "Compare before and after",
        "warmer",
        "The judge is shown two pictures of the same seed, the untaught model's "
        "and the present one's, and is asked how the second differs from the first.",
        "a photo of a beach",
        "Is this a photo of a beach?" + SUFFIX,
        guide="DualProcessBeforeAfterGuide",
        training=COLOURS | FOLLOWING,
        try_this='Ask for another change: "Is the second picture more ... than the first? Answer with Yes or No." '
        "The judge has to be a model that takes two pictures at once.",
    ),
]
BEST = Lesson(
    "Best of N with the judge",
    "",
    "Of eight pictures, those of a cup on its side whose water spills come first.",
    SPILLED_PROMPT,
    SPILLED_KEEP,
    (SPILLED, ("Is the cup lying on its side?" + SUFFIX, "Yes")),
    try_this="Raise *keep* on Judge Score to pick several, or *batch_size* to choose among more.",
)


def lessons() -> Iterator[tuple[Lesson, Models]]:
    """What there is a template of."""
    yield from ((lesson, TINY) for lesson in [*TINY_LESSONS, TINY_BEST])
    yield from ((lesson, TINY_GUIDED) for lesson in TINY_GUIDED_LESSONS)
    yield from ((lesson, FLUX) for lesson in LESSONS)
    yield from ((lesson, TURBO) for lesson in (LESSONS[0], BEST))


def file_name(lesson: Lesson, models: Models) -> str:
    """A template's name, as users see it."""
    return f"{lesson.name} ({models.label})" if models.label else lesson.name
