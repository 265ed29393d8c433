"""The guide nodes in a real ComfyUI server, and what comes out of Seen by the Judge."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from dual_process.demo.client import PromptFailed, PromptRejected
from dual_process.vlm.guides import Areas, Horizon, Palette, Points, Stroke
from dual_process.vlm.overlay import Overlay, PlacedPicture

GREY = (102, 102, 102)
HEIGHT, WIDTH = 96, 160
LOOKS = {"show": "solid", "opacity": 1.0}
DRAWN = {
    "HorizonGuide": ({"height": 0.7}, Horizon(0.7)),
    "PaletteGuide": ({"colours": "#e07a5f 3d405b", "swatches": 3}, Palette(((224, 122, 95), (61, 64, 91)))),
    "LineWeightGuide": ({"pixels": 5}, Stroke(5)),
    "DepthGuide": ({"a_x": 0.2, "a_y": 0.3, "b_x": 0.7, "b_y": 0.6}, Points((0.2, 0.3), (0.7, 0.6))),
}
PICTURE = {"class_type": "EmptyImage", "inputs": {"width": WIDTH, "height": HEIGHT, "batch_size": 1, "color": 0x666666}}


def graph(client, guides, seen=None, **others):
    """Grey pictures under one question for each guide, given as {name: (node without its prefix, inputs)}."""
    nodes, chain = {"picture": PICTURE, **others}, None
    for name, (kind, inputs) in guides.items():
        nodes[name] = {"class_type": f"DualProcess{kind}", "inputs": inputs}
        (text_output,) = [i for i, n in enumerate(output_names(client, kind)) if n == "question"] or [None]
        text = "What is this?" if text_output is None else [name, text_output]
        question = {"text": text, "answer": "Yes", "weight": 1.0, "guide": [name, 0]}
        nodes[f"ask {name}"] = {
            "class_type": "DualProcessQuestion",
            "inputs": question if chain is None else {**question, "questions": [chain, 0]},
        }
        chain = f"ask {name}"
    inputs = {"images": ["picture", 0], "questions": [chain, 0], **(seen or {})}
    nodes["seen"] = {"class_type": "DualProcessSeenByJudge", "inputs": inputs}
    return nodes


def output_names(client, kind):
    return client.get_json(f"/object_info/DualProcess{kind}")[f"DualProcess{kind}"]["output_name"]


def defaults(client, kind):
    """What a freshly placed node sends."""
    required = client.get_json(f"/object_info/DualProcess{kind}")[f"DualProcess{kind}"]["input"]["required"]
    values = {}
    for name, (type_, *options) in required.items():
        given = options[0] if options else {}
        values[name] = given.get("default", given.get("options", type_)[0])
    return values


def pictures(client, shown):
    """The shown pictures as float arrays [h, w, 3], 0..1."""
    opened = [Image.open(io.BytesIO(client.picture(one))).convert("RGB") for one in shown["images"]]
    return [np.asarray(one, dtype=np.float32) / 255 for one in opened]


def over_grey(drawing, **how):
    grey = torch.full((1, 3, HEIGHT, WIDTH), 0.4)
    return Overlay(drawing, **how).shown([grey])[0][0].movedim(0, -1).numpy()


def test_every_drawn_guide_is_seen_as_drawn(client):
    guides = {kind: (kind, {**defaults(client, kind), **inputs}) for kind, (inputs, _) in DRAWN.items()}
    outputs = client.run(graph(client, guides))
    seen = pictures(client, outputs["seen"])
    for one, (_, drawing) in zip(seen, DRAWN.values(), strict=True):
        assert one.shape == (HEIGHT, WIDTH, 3)
        assert np.abs(one - over_grey(drawing)).max() < 1.5 / 255
    for kind in DRAWN:
        (on_node,) = pictures(client, outputs[kind])
        assert on_node.shape == (512, 512, 3) and on_node.max() == 1
    lines = outputs["seen"]["text"][0].splitlines()
    assert "Is the overlaid red line aligned with the horizon of the scene? Answer with Yes or No." in lines[0]
    assert "Is Point B in the foreground and Point A in the background?" in lines[3]


def test_palette_and_composition_from_pictures(client):
    red = {"class_type": "EmptyImage", "inputs": {**PICTURE["inputs"], "color": 0xC81E0A}}
    mask = {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 40, "height": 24}}
    guides = {
        "palette": ("PaletteGuide", {**defaults(client, "PaletteGuide"), "reference": ["red", 0]}),
        "area": ("CompositionGuide", {**defaults(client, "CompositionGuide"), "labels": "sky", "mask": ["mask", 0]}),
        "sketch": ("CompositionGuide", {**defaults(client, "CompositionGuide"), "sketch": ["red", 0], "opacity": 0.5}),
    }
    palette, area, sketch = pictures(client, client.run(graph(client, guides, red=red, mask=mask))["seen"])
    assert (palette[-1, 80] * 255).round().tolist() == [200, 30, 10]
    assert np.abs(area - over_grey(Areas(torch.ones(1, 24, 40), ("sky",)))).max() < 1.5 / 255
    assert np.abs(sketch - (0.2 + 0.5 * np.array([200, 30, 10]) / 255)).max() < 1.5 / 255


def test_any_picture_over_beside_and_after_a_reference(client):
    blue = {"class_type": "EmptyImage", "inputs": {"width": 20, "height": 30, "batch_size": 1, "color": 0x0000FF}}
    mask = {"class_type": "SolidMask", "inputs": {"value": 0.75, "width": 7, "height": 5}}
    placed = {**defaults(client, "GuideFromImage"), "image": ["blue", 0], "x": 0.25, "y": 0.75, "scale": 0.5}
    guides = {
        "over": ("GuideFromImage", placed),
        "masked": ("GuideFromImage", {**placed, "mask": ["mask", 0]}),
        "beside": ("GuideFromImage", {**placed, "show": "beside"}),
    }
    compared = {"before": ("BeforeAfterGuide", defaults(client, "BeforeAfterGuide"))}

    def seen_under(guides):
        return pictures(
            client, client.run(graph(client, guides, {"reference": ["blue", 0]}, blue=blue, mask=mask))["seen"]
        )

    with_reference = 20 + 4  # px: its width, and the gap
    (*drawn_over, beside), with_compared = seen_under(guides), seen_under(guides | compared)
    image = torch.tensor([0.0, 0.0, 1.0])[:, None, None].expand(3, 30, 20)
    for n, alpha in enumerate((None, torch.full((30, 20), 0.25))):
        expected = over_grey(PlacedPicture(image, alpha, x=0.25, y=0.75, scale=0.5))
        assert np.abs(drawn_over[n][:, with_reference:] - expected).max() < 1.5 / 255
        assert np.abs(with_compared[n] - expected).max() < 1.5 / 255, "the reference is the picture before: not for it"
    assert beside.shape == (HEIGHT, 2 * with_reference + WIDTH, 3) and beside[5, 30].tolist() == [0, 0, 1]
    *_, beside, before = with_compared
    assert beside.shape == (HEIGHT, with_reference + WIDTH, 3) and beside[5, 5].tolist() == [0, 0, 1]
    assert before.shape == (HEIGHT, with_reference + WIDTH, 3) and before[5, 5].tolist() == [0, 0, 1]


def test_with_a_judge_its_own_size_is_seen(client):
    judge = {
        "class_type": "DualProcessJudgeLoader",
        "inputs": {"judge": "tiny judge (bundled)", "dtype": "auto"},
    }
    guides = {"horizon": ("HorizonGuide", {**defaults(client, "HorizonGuide"), "height": 0.25})}
    (seen,) = pictures(client, client.run(graph(client, guides, {"judge": ["judge", 0]}, judge=judge))["seen"])
    assert seen.shape[:2] != (HEIGHT, WIDTH)
    red = seen[..., 0] - seen[..., 1]
    assert red.sum(axis=1).argmax() == pytest.approx(0.75 * seen.shape[0], abs=1)


@pytest.mark.parametrize(
    ("kind", "inputs", "sentence"),
    [
        ("PaletteGuide", {"colours": "#e07a5f, sand"}, '"sand" is not a colour: write hex codes'),
        ("PaletteGuide", {"colours": " "}, "The palette is empty: give hex codes"),
        ("PaletteGuide", {"colours": "#123 " * 33}, "The palette has 33 colours: give 32 at most"),
        ("CompositionGuide", {}, "connect one of the two"),
        ("GuideFromImage", {"image": ["two", 0]}, "A guide is one picture, but 2 are connected"),
        ("CompositionGuide", {"sketch": ["picture", 0]}, "The guide covers the whole picture"),
        ("GuideFromImage", {"image": ["picture", 0], "fit": "stretch over the picture"}, "covers the whole picture"),
        ("BeforeAfterGuide", {}, "connect the picture before as reference"),
        ("HorizonGuide", {"height": ["number", 0]}, "The height of the horizon is 1.5: give a share from 0 to 1"),
    ],
)
def test_what_cannot_be_a_guide_is_one_sentence(client, kind, inputs, sentence):
    others = {
        "two": {"class_type": "EmptyImage", "inputs": {**PICTURE["inputs"], "batch_size": 2}},
        "number": {"class_type": "PrimitiveFloat", "inputs": {"value": 1.5}},
    }
    guides = {"guide": (kind, {**defaults(client, kind), **inputs})}
    with pytest.raises(PromptFailed, match=sentence):
        client.run(graph(client, guides, **others))


def test_a_height_out_of_range_is_refused_before_anything_runs(client):
    with pytest.raises(PromptRejected, match="height"):
        client.run(graph(client, {"horizon": ("HorizonGuide", {**defaults(client, "HorizonGuide"), "height": 1.5})}))


@pytest.mark.parametrize("halves", [False, True])
def test_a_drawing_on_a_transparent_ground_covers_only_where_it_is_drawn(comfy, halves):
    """Load Image gives black and a mask there, some other nodes a fourth channel."""
    from dual_process.nodes.guides import CompositionGuide, PaletteGuide

    sketch, mask = torch.zeros(1, 64, 64, 3), torch.ones(1, 64, 64)
    sketch[:, 20:40, 20:40], mask[:, 20:40, 20:40] = torch.tensor([1.0, 0.0, 0.0]), 0.0
    with_alpha = torch.cat([sketch, 1 - mask[..., None]], dim=-1)
    if halves:  # as ComfyUI 0.33 gives them with --fp16-intermediates
        sketch, mask, with_alpha = sketch.half(), mask.half(), with_alpha.half()
    common = {"labels": "", "question": "?", **LOOKS}
    grey = torch.full((1, 3, 64, 64), 0.4)
    for given in ({"sketch": sketch, "mask": mask}, {"sketch": with_alpha}):
        (shown,) = CompositionGuide.execute(**common, **given).result[0].shown([grey])
        assert torch.allclose(shown[0, :, 30, 30], torch.tensor([1.0, 0, 0]), atol=1e-3)
        assert torch.equal(shown[0, :, 5, 5], grey[0, :, 5, 5])
    palette = PaletteGuide.execute("", 2, "?", **LOOKS, reference=with_alpha).result[0].drawing
    assert set(palette.colours) == {(255, 255, 255), (255, 0, 0)}


def test_what_covers_pictures_of_one_shape_only_and_a_mask_without_a_clear_place_are_no_reason_to_refuse(comfy):
    from dual_process.nodes.guides import CompositionGuide, GuideFromImage

    square, nothing_clear = torch.full((1, 64, 64, 3), 0.3), torch.zeros(1, 64, 64)
    GuideFromImage.execute(square, "solid", 1.0, 0.5, 0.5, 1.0, "keep its shape")
    on_white = torch.ones(1, 64, 64, 3)
    on_white[:, 20:40, 20:40] = 0.0
    overlay = CompositionGuide.execute("", "?", **LOOKS, mask=nothing_clear, sketch=on_white).result[0]
    assert overlay.drawn(64, 64)[1].mean() == pytest.approx(400 / 4096, abs=0.05)
