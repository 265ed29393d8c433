"""How well a control holds, said by functions that measure pixels and know nothing of the judge.

`python3 dev.py bench control --json FILE [--quick]` teaches the bundled student, on seeds it is not measured on: each
property both ways (the first seed's LoRAs are also drawn at strengths from -1 to 2), two properties at once and as two
LoRAs, ten times the steps at five times the rate, the published recipe, every guard taken away, one at a time (in
batches of half the size, all at the rate of colours), several values of guides, and comparisons with the picture before
(guided.py). Rows that are in FILE already are not taught again, also if the bundled judges have changed since, so a
stopped run goes on where it was; pictures and LoRAs lie beside it, FILE_guides.png shows all guides. Ends with tables
of all rows.
"""

from __future__ import annotations

import argparse
import itertools
import math
from dataclasses import replace
from pathlib import Path
from statistics import mean

from safetensors.torch import load_file

from dual_process.benchmarks import guided
from dual_process.benchmarks.bundled import BATCH, COLOURS, FEW, TEMPLATE, TEMPLATES, Laboratory, Lesson
from dual_process.benchmarks.markdown import table_of
from dual_process.benchmarks.table import MEASURES, PROPERTIES, Table, largest_change
from dual_process.demo.lessons import ALL_CHANGES
from dual_process.demo.measure import share
from dual_process.tiny.oracles import measure
from dual_process.trainers.dual_process import EARLY_STEPS, Run, Settings
from dual_process.trainers.objective import LIKELIHOOD, MARGIN

SLID = [f"{about} Yes" for about in PROPERTIES]
EVERY = [(about, answer) for about in PROPERTIES for answer in ("Yes", "No")]
STRENGTHS = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
PAIR = {"horizon": "Yes", "palette": "No"}
# Luo et al., section 4: cross-entropy, a random step, no guard of any kind; the rate is the one that suits this student
UNGUARDED = {"anchor": 0.0, "prior": 0.0, "judge_noise": 0.0, "average": 0.0, "check_every": 0}
PUBLISHED = Settings(steps=180, learning_rate=1e-3, **UNGUARDED)
# guard taken away, or another choice -> what is changed in the settings; taught on the harder answer of each property,
# in batches of half the size, TEMPLATE's number of steps and colours' rate, and beside it the same with nothing changed
HARDER = [("horizon", "No"), ("palette", "Yes"), ("line", "No"), ("depth", "No")]
WITHOUT = {
    "with everything": {},
    "without the anchor": {"anchor": 0.0},
    "without the prior": {"prior": 0.0},
    "without noise before the judge": {"judge_noise": 0.0},
    "without the running average": {"average": 0.0},
    "without clipping": {"clip": math.inf},
    "without going back when pictures drift": {"drift_limit": 0.0},
    "without stop or lower rate when held": {"stop_at": math.inf},
    "without looks at held-out seeds": {"check_every": 0},
    "without a target": {"kind": LIKELIHOOD},
    "without the question to keep": {"keep": False},
    "learning at early steps": {"learn_at": EARLY_STEPS},
    "with crops and contrast": {"augment": 1.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="rows are added to this file")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one training seed instead of three, three values of a guide instead of five",
    )
    parser.add_argument("--only", default="", help="rows whose name begins so")
    arguments = parser.parse_args()
    table, laboratory = Table(arguments.json), Laboratory()

    def teach(name: str, goals: dict[str, str], settings: Settings, keep=True, kind=MARGIN, **how) -> None:
        """One row, unless it is there already."""
        if name.startswith(arguments.only) and not table.has(name, settings.seed):
            lesson = laboratory.teach(goals, settings, keep, kind, **how)
            more = slider(laboratory, lesson, *goals) if name in SLID and settings.seed == 0 else {}
            table.add(name, settings.seed, lesson, goals, more)

    seeds = range(1 if arguments.quick else 3)
    for seed in seeds:
        ours = replace(TEMPLATE, seed=seed)
        for about, answer in EVERY:
            teach(f"{about} {answer}", {about: answer}, replace(TEMPLATES[about], seed=seed))
        teach("two at once", PAIR, replace(ours, **ALL_CHANGES, learning_rate=COLOURS.learning_rate))
        if "two stacked".startswith(arguments.only) and not table.has("two stacked", seed):
            table.add("two stacked", seed, stacked(laboratory, table, seed), PAIR)
        drill = replace(ours, steps=10 * ours.steps, learning_rate=5 * ours.learning_rate)
        teach("ten times the steps, five times the rate", {"horizon": "Yes"}, drill)
        for about, answer in EVERY:
            recipe = f"published recipe, {about} {answer}"
            teach(recipe, {about: answer}, replace(PUBLISHED, seed=seed), False, LIKELIHOOD)
    for name, change in WITHOUT.items():
        settings = {key: value for key, value in change.items() if key not in ("keep", "kind")}
        choices = {key: value for key, value in change.items() if key in ("keep", "kind")}
        for seed, (about, answer) in itertools.product(seeds, HARDER):
            slow = {"steps": TEMPLATE.steps, "learning_rate": COLOURS.learning_rate}
            changed = replace(TEMPLATES[about], seed=seed, **slow, **settings)
            teach(f"{name}, {about} {answer}", {about: answer}, changed, batch=BATCH // 2, count=FEW, **choices)
    guided.teach_all(table, laboratory, arguments.only, seldom=arguments.quick)
    guided.save_examples(table, laboratory)
    print(f"{summary(table.rows)}\n\n{guided.summary(table.rows)}")


def summary(rows: list[dict]) -> str:
    """Markdown: one line per row's name, mean over training seeds and the worst of them; guards are the largest change
    of luminance, saturation, edges, colour entropy of any seed, drift is the largest of any look, strangeness that of
    any kept LoRA, where they are known. Rows of guides have a table of their own."""
    columns = "taught, has it, worst seed, clean, largest guard change, diversity, drift of looks, strangeness, steps"
    lines = []
    for name in dict.fromkeys(row["row"] for row in rows):
        seeds = [row for row in rows if row["row"] == name]
        found = [value for row in seeds for value in row.values() if isinstance(value, dict) and "oracle" in value]
        if not found:
            continue
        oracle, clean = ([one[key] for one in found] for key in ("oracle", "readable"))
        changed = largest_change([one["changes"] for one in found])
        diversity = min(one["changes"]["diversity"] for one in found)
        drift, strange = ([row[key] for row in seeds if row.get(key) is not None] for key in ("drift", "strangeness"))
        most = [f"{max(drift):.0%}" if drift else "-", f"{max(strange):.1f}" if strange else "-"]
        has = [f"{mean(oracle):.1%}", f"{min(oracle):.1%}", f"{mean(clean):.1%}"]
        lines.append([name, *has, changed, f"{diversity:+.0%}", *most, f"{mean(row['steps'] for row in seeds):.0f}"])
    return table_of(columns.split(", "), lines)


def slider(laboratory: Laboratory, lesson: Lesson, about: str) -> dict:
    """What the oracle measures, as a mean over the readable pictures, at every strength of the lesson's LoRA."""
    slid = {}
    for strength in STRENGTHS:
        found = measure(laboratory.draw([lesson.lora], 2 * BATCH, strength=strength))
        value = found[MEASURES[about]][found["readable"]].mean().item()
        slid[strength] = {"mean": value, "readable": share(found["readable"])}
    return {"strengths": slid}


def stacked(laboratory: Laboratory, table: Table, seed: int) -> Lesson:
    """The LoRAs of two properties that were taught alone, both on one model."""
    files = [table.lora(f"{about} {answer}", seed) for about, answer in PAIR.items()]
    if missing := [file.name for file in files if not file.exists()]:
        raise SystemExit(
            f"'two stacked' needs {', '.join(missing)} beside {table.file}: teach those rows into that file."
        )
    loras = [load_file(file) for file in files]
    return Lesson(Run(), {}, laboratory.draw(), laboratory.draw(loras), 0.0)


if __name__ == "__main__":
    main()
