"""Which architectures of generators can be taught, and how exactly, on the ComfyUI at hand.

    python3 dev.py matrix students --json students.json --also other_comfyui.json --readme README.md

Every architecture is built tiny and random from ComfyUI's own classes and put through three checks: autograd against
finite differences from the picture to the LoRA, with and without checkpointing; the model's output before and after a
training step, bit by bit; the share of the exported LoRA's layers that the stock LoRA loader recognises.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from pathlib import Path

import torch

from dual_process.benchmarks.markdown import put_between_marks, table_of
from dual_process.demo.comfyui import use_comfyui
from dual_process.tests.gradients import give_lora_a_value, picture_to_lora_ratio

TOLERANCE = 0.01  # of the gradient


def finite_difference(lab, name: str, checkpointed: bool) -> float:
    """Autograd's directional derivative divided by the finite difference, picture to LoRA."""
    vae = lab.linear_vae(name)
    return picture_to_lora_ratio(lab.build_student(name, vae=vae, checkpointed=checkpointed))


def base_identical(lab, name: str) -> bool:
    """Whether the MODEL samples the same bits before and after a backward through it."""
    model = lab.build_model(name)
    before = lab.sample(model, name)
    student = lab.build_student(name, model)

    def loop() -> None:
        give_lora_a_value(student.lora)
        student.decode(student.predict(student.roll(student.noise(3), 2), 2)).sum().backward()

    student.run(loop, beside=[])
    return torch.equal(lab.sample(model, name), before)


def keys_loaded(lab, name: str, loras: Path) -> str:
    """'<layers that the stock loader patches>/<layers in the file>' of an exported LoRA."""
    import nodes
    from dual_process.trainers.lora_file import new_lora_path, save_lora

    model = lab.build_model(name)
    lora = lab.build_student(name, model).lora
    path = new_lora_path(loras, "student")
    save_lora(lora.export(), path)
    (patched,) = nodes.LoraLoaderModelOnly().load_lora_model_only(model, path.name, 1.0)
    return f"{len(patched.patches)}/{len(lora.paths)}"


def examine(lab, name: str, loras: Path, comfyui: str) -> dict:
    """One row of the matrix; an architecture that cannot be built or run says why."""
    row = {"name": name, "finite_difference": {}, "base_identical": False, "keys_loaded": "", "comfyui": comfyui}
    try:
        for label, checkpointed in (("checkpointed", True), ("plain", False)):
            row["finite_difference"][label] = finite_difference(lab, name, checkpointed)
        row["base_identical"] = base_identical(lab, name)
        row["keys_loaded"] = keys_loaded(lab, name, loras)
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        return {**row, "ok": False, "why": f"{type(error).__name__}: {error}"}
    wrong = [label for label, ratio in row["finite_difference"].items() if abs(ratio - 1) > TOLERANCE]
    loaded, exported = row["keys_loaded"].split("/")
    failed = [
        *(f"gradient ({label})" for label in wrong),
        *([] if row["base_identical"] else ["the model was changed"]),
        *([] if loaded == exported else ["LoRA keys"]),
    ]
    return {**row, "ok": not failed, "why": ", ".join(failed)}


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table: one line per architecture, the versions of ComfyUI beside each other."""
    versions = list(dict.fromkeys(row["comfyui"] for row in rows))
    of = {(row["name"], row["comfyui"]): row for row in rows}
    others = ["gradient error", "model untouched", "LoRA keys", "note"]
    columns = ["architecture", *(f"ComfyUI {version}" for version in versions), *others]
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows):
        examined = [of[name, version] for version in versions if (name, version) in of]
        errors = [abs(ratio - 1) for row in examined for ratio in row["finite_difference"].values()]
        cells = [
            *(("yes" if of[name, version]["ok"] else "no") if (name, version) in of else "" for version in versions),
            f"{max(errors):.2%}" if errors else "",
            "yes" if all(row["base_identical"] for row in examined) else "no",
            ", ".join(dict.fromkeys(row["keys_loaded"] for row in examined)),
            "; ".join(dict.fromkeys(row["why"] for row in examined if row["why"])),
        ]
        lines.append([name, *cells])
    return table_of(columns, lines)


def main() -> None:
    """Examine the architectures, print the table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write one row per architecture to this file")
    parser.add_argument("--only", nargs="*", help="architectures to examine")
    parser.add_argument("--also", type=Path, nargs="*", default=[], help="files written on other versions of ComfyUI")
    parser.add_argument("--readme", type=Path, help="write the table between the marks in this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as base:
        use_comfyui(Path(base))
        import comfy.utils
        import comfyui_version
        import folder_paths

        from dual_process.tests import architectures as lab

        logging.getLogger().setLevel(logging.ERROR)
        comfy.utils.set_progress_bar_enabled(False)
        loras = Path(folder_paths.get_folder_paths("loras")[0])
        with torch.inference_mode():  # as ComfyUI runs nodes
            names = arguments.only or lab.ARCHITECTURES
            rows = [examine(lab, name, loras, comfyui_version.__version__) for name in names]
    print(f"{sum(row['ok'] for row in rows)} of {len(rows)} architectures on ComfyUI {rows[0]['comfyui']}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    rows += [row for other in arguments.also for row in json.loads(other.read_text(encoding="utf-8"))]
    print(table(rows))
    if arguments.readme:
        put_between_marks(arguments.readme, "students", table(rows))


if __name__ == "__main__":
    main()
