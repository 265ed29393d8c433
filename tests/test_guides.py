"""The drawings of the visual prompts, measured in their pixels."""

from __future__ import annotations

import pytest
import torch

from dual_process.vlm.guides import Areas, Horizon, Palette, Points, Stroke, palette_of, parse_colours
from dual_process.vlm.overlay import on_white

SIZES = [(64, 64), (256, 384), (300, 130)]
RED = torch.tensor([230, 25, 25])[:, None, None] / 255
BOX = torch.zeros(1, 32, 48)
BOX[0, 8:24, 12:24] = 1
DOT = torch.zeros(1, 32, 48)
DOT[0, 16, 20] = 1


def redness(drawing, height, width):
    """Alpha of the red parts ``[H, W]``, after a check that nothing else is drawn."""
    drawn = drawing.draw(height, width)
    assert drawn.shape == (4, height, width) and drawn.min() >= 0 and drawn.max() <= 1
    assert torch.allclose(drawn[:3], RED * drawn[3], atol=2 / 255)
    return drawn[3]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("height", [0.1, 0.5, 0.83])
def test_the_horizon_lies_at_its_height(size, height):
    alpha = redness(Horizon(height), *size)
    rows = torch.arange(size[0]) + 0.5
    assert torch.equal(alpha, alpha[:, :1].expand(-1, size[1])), "from edge to edge"
    middle = (alpha[:, 0] * rows).sum() / alpha[:, 0].sum()
    assert middle.item() == pytest.approx((1 - height) * size[0], abs=0.3)
    assert alpha[:, 0].sum().item() == pytest.approx(max(2, min(size) / 80), abs=0.3)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("weight", [1, 4, 9.5])
def test_the_stroke_is_as_thick_as_it_says(size, weight):
    alpha = redness(Stroke(weight), *size)
    assert alpha[:, size[1] // 2].sum().item() == pytest.approx(weight, abs=0.3)
    assert alpha[: size[0] // 2].max() == 0 and alpha[:, 0].max() == 0


@pytest.mark.parametrize("size", SIZES)
def test_swatches_have_exactly_their_colours_and_equal_shares(size):
    colours = parse_colours("#e07a5f, #3d405b\n81b29a;#fC8")
    assert colours == ((224, 122, 95), (61, 64, 91), (129, 178, 154), (255, 204, 136))
    drawn = (Palette(colours).draw(*size) * 255).round().int()
    row = drawn[:3, size[0] - 3].T.tolist()
    counts = [row.count(list(colour)) for colour in colours]
    assert max(counts) - min(counts) <= 2 and sum(counts) > 0.9 * size[1] - 2 * len(colours)
    assert (drawn[3, : int(size[0] * 0.8)] == 0).all() and (drawn[3, -1] == 255).all()


@pytest.mark.parametrize("size", SIZES)
def test_points_are_where_they_were_put(size):
    a, b = (0.25, 0.3), (0.75, 0.6)
    alpha = Points(a, b).draw(*size)[3]
    rows, columns = (torch.arange(n) + 0.5 for n in size)
    for (x, y), half in ((a, slice(0, size[1] // 2)), (b, slice(size[1] // 2, None))):
        dot = alpha[:, half]
        assert ((dot.sum(0) * columns[half]).sum() / dot.sum()).item() == pytest.approx(x * size[1], abs=0.5)
        assert ((dot.sum(1) * rows).sum() / dot.sum()).item() == pytest.approx(y * size[0], abs=0.5)


def test_the_letters_tell_the_points_apart():
    one, other = Points((0.3, 0.5), (0.7, 0.5)), Points((0.7, 0.5), (0.3, 0.5))
    assert (on_white(one.draw(256, 256)) - on_white(other.draw(256, 256))).abs().max() > 0.5


def test_an_area_is_outlined_inside_its_edge_and_left_clear():
    alpha = redness(Areas(BOX), 256, 384)
    assert alpha[66, 100:188].min() > 0.9 and alpha[100, 98] > 0.9  # top and left edge of rows 64..192, columns 96..192
    assert alpha[80:176, 112:176].max() == 0 and alpha[:56].max() == 0 and alpha[:, 200:].max() == 0


def test_a_label_is_written_in_the_middle_of_its_area():
    plain, labelled = redness(Areas(BOX), 256, 384), redness(Areas(BOX, ("tree",)), 256, 384)
    rows, columns = (labelled - plain > 0.1).nonzero(as_tuple=True)
    assert rows.float().mean().item() == pytest.approx(128, abs=4)
    assert columns.float().mean().item() == pytest.approx(144, abs=4)


def test_all_of_ascii_can_be_a_label():
    Areas(BOX, ("".join(map(chr, range(32, 127))),))


def test_the_palette_of_a_picture_is_its_colours_the_most_frequent_first():
    image = torch.empty(3, 30, 40)
    for columns, colour in ((slice(0, 24), (200, 30, 10)), (slice(24, 36), (20, 40, 220)), (slice(36, 40), (9, 9, 9))):
        image[:, :, columns] = torch.tensor(colour)[:, None, None] / 255
    assert palette_of(image, 3) == ((200, 30, 10), (20, 40, 220), (9, 9, 9))
    assert len(palette_of(image, 8)) == 3 and len(palette_of(image, 2)) == 2


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Horizon(1.3), "The height of the horizon is 1.3: give a share from 0 to 1"),
        (lambda: Points((0.5, -0.2), (0.5, 0.5)), "The y of Point A is -0.2: give a share from 0 to 1"),
        (lambda: Palette(()), "The palette is empty: give hex codes"),
        (lambda: parse_colours("#e07a5f, reddish"), '"reddish" is not a colour: write hex codes'),
        (lambda: Areas(torch.zeros(2, 8, 8)), "Mask 1 of the composition is empty"),
        (lambda: Areas(BOX, ("tree", "moon")), "There are 2 labels for 1 masks"),
        (lambda: Areas(torch.cat([BOX, DOT])).draw(4, 6), "Mask 2 .*, 48 x 32 px, is too small .* of 6 x 4 px: paint"),
        (lambda: Areas(BOX, ("tree 木木 \t",)), r"The label 'tree 木木 \t' .* drawn \('木', '\\t'\): write it with"),
    ],
)
def test_what_cannot_be_drawn_is_one_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
