"""The questions about scenes: one place for their wording.

Each property is asked in two opposite wordings. "Yes" to the first wording means the upper half of the property's
factor (`scenes.CLAUSES`), "Yes" to the second the lower half; a ruined picture is answered "No" in both.
"""

from __future__ import annotations

SUFFIX = " Answer with Yes or No."

# property -> (asks for the upper half, asks for the lower half); the first of each is the wording used everywhere
WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "horizon": (
        ("Is the horizon in the upper half of the picture?", "Is the horizon high?",
         "Does this picture have a high horizon?", "Is there more ground than sky?"),
        ("Is the horizon in the lower half of the picture?", "Is the horizon low?",
         "Does this picture have a low horizon?", "Is there more sky than ground?"),
    ),
    "palette": (
        ("Are the colours of the picture warm?", "Is the palette warm?", "Does this picture have warm colours?",
         "Is this a warm landscape?"),
        ("Are the colours of the picture cool?", "Is the palette cool?", "Does this picture have cool colours?",
         "Is this a cool landscape?"),
    ),
    "line": (
        ("Are the lines of the picture thick?", "Is the line weight heavy?", "Does this picture have thick lines?",
         "Are the outlines thick?"),
        ("Are the lines of the picture thin?", "Is the line weight light?", "Does this picture have thin lines?",
         "Are the outlines thin?"),
    ),
    "depth": (
        ("Is the white ball in front of the green ball?", "Is the white ball nearer?", "Is the white ball in front?",
         "Is the green ball behind the white ball?"),
        ("Is the green ball in front of the white ball?", "Is the green ball nearer?", "Is the green ball in front?",
         "Is the white ball behind the green ball?"),
    ),
}

# "Yes" for every clean picture, "No" for every ruin
KEEP_WORDINGS = ("Is this a clean picture of a landscape with two balls?", "Is this a landscape with two balls?",
                 "Is the picture clean?")

QUESTIONS = {name: (upper[0] + SUFFIX, lower[0] + SUFFIX) for name, (upper, lower) in WORDINGS.items()}
KEEP_QUESTION = KEEP_WORDINGS[0] + SUFFIX

# about the second of two pictures, for the judge that compares
HIGHER = f"Is the horizon of the second picture higher than that of the first?{SUFFIX}"
THICKER = f"Are the lines of the second picture thicker than those of the first?{SUFFIX}"
