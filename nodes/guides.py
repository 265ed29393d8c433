"""Guides: what is drawn over or shown beside a picture when the judge is asked about it."""

import torch
from comfy_api.latest import io, ui
from torch.nn.functional import interpolate

from ..vlm.guides import (
    BEFORE_AFTER_QUESTION,
    COMPOSITION_QUESTION,
    DEPTH_QUESTION,
    HORIZON_QUESTION,
    LINE_WEIGHT_QUESTION,
    MOST_SWATCHES,
    PALETTE_QUESTION,
    Areas,
    Horizon,
    Palette,
    Points,
    Stroke,
    palette_of,
    parse_colours,
)
from ..vlm.overlay import (
    BESIDE,
    SOLID,
    TRANSPARENT,
    BeforeAfter,
    Beside,
    Drawing,
    Overlay,
    PlacedPicture,
    on_white,
)
from .refusal import check_choices
from .types import CATEGORY, GuideType

SHOWN_SIDE = 512  # px of the drawing on the node; the judge's is drawn at the size of the picture
KEEP_SHAPE, STRETCH = "keep its shape", "stretch over the picture"


class HorizonGuide(io.ComfyNode):
    """A line at the height where the horizon is wanted."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DualProcessHorizonGuide",
            display_name="Horizon Guide",
            category=CATEGORY,
            description="Draws a red line over the picture, at the height where the horizon is wanted.",
            inputs=[
                _share("height", 0.66, "Height of the line: 0 is the bottom edge of the picture, 1 the top edge."),
                *_wording_and_showing(HORIZON_QUESTION),
            ],
            outputs=_drawn_outputs(),
        )

    @classmethod
    def execute(cls, height, question, show, opacity):
        return _drawn(cls, Horizon(height), question, show, opacity)


class PaletteGuide(io.ComfyNode):
    """The wanted colours as a strip of swatches."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DualProcessPaletteGuide",
            display_name="Palette Guide",
            category=CATEGORY,
            description="Draws swatches of the wanted colours along the bottom of the picture.",
            inputs=[
                io.String.Input(
                    "colours",
                    default="#e07a5f, #3d405b, #f2cc8f",
                    tooltip="Hex codes, separated by commas or spaces. Not used when a reference is connected.",
                ),
                io.Int.Input(
                    "swatches",
                    default=3,
                    min=1,
                    max=MOST_SWATCHES,
                    tooltip="How many colours are taken from the reference.",
                ),
                *_wording_and_showing(PALETTE_QUESTION),
                io.Image.Input(
                    "reference", optional=True, tooltip="A picture whose most frequent colours make the palette."
                ),
            ],
            outputs=_drawn_outputs(),
        )

    @classmethod
    def execute(cls, colours, swatches, question, show, opacity, reference=None):
        found = parse_colours(colours) if reference is None else palette_of(_own_picture(reference), swatches)
        return _drawn(cls, Palette(found), question, show, opacity)


class LineWeightGuide(io.ComfyNode):
    """A stroke as thick as the wanted lines."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DualProcessLineWeightGuide",
            display_name="Line Weight Guide",
            category=CATEGORY,
            description="Draws a red stroke near the bottom of the picture, as thick as its lines should be.",
            inputs=[
                io.Float.Input(
                    "pixels", default=8.0, min=1.0, max=512.0, step=0.5, tooltip="Thickness in pixels of the picture."
                ),
                *_wording_and_showing(LINE_WEIGHT_QUESTION),
            ],
            outputs=_drawn_outputs(),
        )

    @classmethod
    def execute(cls, pixels, question, show, opacity):
        return _drawn(cls, Stroke(pixels), question, show, opacity)


class DepthGuide(io.ComfyNode):
    """Two marked places, of which one should be nearer."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DualProcessDepthGuide",
            display_name="Depth Guide",
            category=CATEGORY,
            description="Marks the points A and B on the picture; the question says which of them should be nearer.",
            inputs=[
                _share("a_x", 0.3, "Point A from the left edge (0) to the right (1)."),
                _share("a_y", 0.35, "Point A from the top edge (0) to the bottom (1)."),
                _share("b_x", 0.65, "Point B from the left edge (0) to the right (1)."),
                _share("b_y", 0.7, "Point B from the top edge (0) to the bottom (1)."),
                *_wording_and_showing(DEPTH_QUESTION),
            ],
            outputs=_drawn_outputs(),
        )

    @classmethod
    def execute(cls, a_x, a_y, b_x, b_y, question, show, opacity):
        return _drawn(cls, Points((a_x, a_y), (b_x, b_y)), question, show, opacity)


class CompositionGuide(io.ComfyNode):
    """Areas or a sketch that say what should be where."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DualProcessCompositionGuide",
            display_name="Composition Guide",
            category=CATEGORY,
            description="Outlines masks in red, with a word in each, or lays a sketch over the picture.",
            inputs=[
                io.String.Input(
                    "labels",
                    multiline=True,
                    default="",
                    tooltip="What belongs in each masked area: one line per mask of the batch, in letters A to Z. "
                    "Not used with a sketch.",
                ),
                *_wording_and_showing(COMPOSITION_QUESTION),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="An area, or a batch of them; stretched to the picture. With a sketch: 1 where the sketch "
                    "is clear, as Load Image gives it.",
                ),
                io.Image.Input(
                    "sketch",
                    optional=True,
                    tooltip="Instead of areas: a drawing on white, for example in red; stretched to the picture. One "
                    "on a transparent ground needs the mask of Load Image too.",
                ),
            ],
            outputs=_drawn_outputs(),
        )

    @classmethod
    def execute(cls, labels, question, show, opacity, mask=None, sketch=None):
        if mask is None and sketch is None:
            raise ValueError("Composition Guide draws a mask or a sketch: connect one of the two.")
        if sketch is not None:
            picture = _own_picture(sketch)
            drawing = PlacedPicture(picture, _alpha(mask, *picture.shape[1:]), stretch=True)
        else:
            drawing = Areas(_own(mask).reshape(-1, *mask.shape[-2:]), tuple(labels.rstrip().splitlines()))
        return _drawn(cls, drawing, question, show, opacity)


class GuideFromImage(io.ComfyNode):
    """Any picture as a guide."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DualProcessGuideFromImage",
            display_name="Guide from Image",
            category=CATEGORY,
            description="Lays any picture over the pictures that the judge is asked about, or shows it beside them.",
            inputs=[
                io.Image.Input("image", tooltip="The guide, of any size. Without a mask its white is clear."),
                io.Combo.Input(
                    "show",
                    options=[SOLID, TRANSPARENT, BESIDE],
                    tooltip="solid: covers what is under it. transparent: half guide on white paper, half picture. "
                    "beside: shown first, as it is; the picture is then the second.",
                ),
                _opacity(),
                _share("x", 0.5, "Where the guide's centre goes, from the left edge (0) to the right (1)."),
                _share("y", 0.5, "Where the guide's centre goes, from the top edge (0) to the bottom (1)."),
                io.Float.Input(
                    "scale", default=1.0, min=0.01, max=10.0, step=0.01, tooltip="1: as large as fits into the picture."
                ),
                io.Combo.Input(
                    "fit", options=[KEEP_SHAPE, STRETCH], tooltip="What happens when guide and picture differ in shape."
                ),
                io.Mask.Input(
                    "mask", optional=True, tooltip="1 where the guide is clear, as Load Image gives it; else by white."
                ),
            ],
            outputs=[GuideType.Output(display_name="guide", tooltip="Connect to a Question.")],
        )

    @classmethod
    def execute(cls, image, show, opacity, x, y, scale, fit, mask=None):
        check_choices(cls.define_schema().inputs, {"show": show, "fit": fit})
        picture = _own_picture(image)
        alpha = _alpha(mask, *picture.shape[1:])
        if show == BESIDE:
            return io.NodeOutput(Beside(picture if alpha is None else picture * alpha + 1 - alpha))
        drawing = PlacedPicture(picture, alpha, x, y, scale, fit == STRETCH)
        return io.NodeOutput(_overlay(drawing, show, opacity))


class BeforeAfterGuide(io.ComfyNode):
    """What the model draws without its LoRA, shown before what it draws with it."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DualProcessBeforeAfterGuide",
            display_name="Before/After Guide",
            category=CATEGORY,
            description="Shows the judge two pictures: what the model draws untaught, then what it draws now. "
            "For questions that compare.",
            inputs=[_wording(BEFORE_AFTER_QUESTION)],
            outputs=[
                GuideType.Output(display_name="guide", tooltip="Connect to a Question."),
                _question_output(),
            ],
        )

    @classmethod
    def execute(cls, question):
        return io.NodeOutput(BeforeAfter(), question)


def _share(name: str, default: float, tooltip: str) -> io.Input:
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, tooltip=tooltip)


def _wording(question: str) -> io.Input:
    return io.String.Input(
        "question", multiline=True, default=question, tooltip="A wording that fits the guide; edit it as you like."
    )


def _opacity() -> io.Input:
    return io.Float.Input(
        "opacity", default=1.0, min=0.05, max=1.0, step=0.05, tooltip="How strongly the guide is laid over the picture."
    )


def _wording_and_showing(question: str) -> list[io.Input]:
    """The widgets of every guide that draws."""
    return [
        _wording(question),
        io.Combo.Input(
            "show",
            options=[SOLID, TRANSPARENT],
            tooltip="solid: the drawing covers, everything else is clear. transparent: the drawing on white paper is "
            "mixed half and half with the picture.",
        ),
        _opacity(),
    ]


def _question_output() -> io.Output:
    return io.String.Output(display_name="question", tooltip="The wording. Connect to a Question's text.")


def _drawn_outputs() -> list[io.Output]:
    return [
        GuideType.Output(display_name="guide", tooltip="Connect to a Question."),
        io.Image.Output(display_name="image", tooltip="The drawing on white paper."),
        _question_output(),
    ]


def _drawn(cls, drawing: Drawing, question: str, show: str, opacity: float) -> io.NodeOutput:
    """The outputs of a guide that draws; its drawing is shown on the node."""
    check_choices(cls.define_schema().inputs, {"show": show})
    image = on_white(drawing.draw(SHOWN_SIDE, SHOWN_SIDE)).movedim(0, -1)[None]
    return io.NodeOutput(_overlay(drawing, show, opacity), image, question, ui=ui.PreviewImage(image, cls=cls))


def _overlay(drawing: Drawing, show: str, opacity: float) -> Overlay:
    """The guide of a drawing.

    Raises:
        ValueError: it leaves nothing of the picture to be seen.
    """
    overlay, side = Overlay(drawing, show, opacity), SHOWN_SIDE
    shapes = (side, side // 2), (side, side), (side // 2, side)  # the picture's own is not known yet
    if all(overlay.drawn(*shape)[1].min() > 0.99 for shape in shapes):
        raise ValueError(
            "The guide covers the whole picture, so the judge would see nothing of it. Draw on white, or connect the "
            "mask that Load Image gives of a drawing on a transparent ground, or lower the opacity."
        )
    return overlay


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """A copy to keep, in fp32: tensors of other nodes are inference tensors, which training could not use."""
    with torch.inference_mode(False):
        return tensor.clone().cpu().float()


def _own_picture(images: torch.Tensor) -> torch.Tensor:
    """The one picture of a batch ``[1, h, w, C]`` as ``[3, h, w]``, on white paper where it has alpha.

    Raises:
        ValueError: there are several.
    """
    if len(images) != 1:
        raise ValueError(f"A guide is one picture, but {len(images)} are connected: choose one with Image From Batch.")
    colour, alpha = _own(images[0].movedim(-1, 0)).split([3, images.shape[-1] - 3])
    return colour * alpha + 1 - alpha if len(alpha) else colour


def _alpha(mask: torch.Tensor | None, height: int, width: int) -> torch.Tensor | None:
    """``[height, width]``, 1 where the guide covers, of a mask of any size that is 1 where it is clear. None without a
    mask, and for one without a clear place, as Load Image gives it of a file that has no transparency."""
    if mask is None or not mask.any():
        return None
    clear = _own(mask).reshape(-1, 1, *mask.shape[-2:])[:1]
    return 1 - interpolate(clear, (height, width), mode="bilinear")[0, 0]
