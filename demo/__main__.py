"""`python3 dev.py demo`: teach the bundled tiny model one property in a real ComfyUI and show what changed."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shutil
import sys
import time
from copy import deepcopy
from pathlib import Path

from safetensors import safe_open

from .client import ComfyClient, Event, Graph
from .comfyui import PACK, ComfyServer
from .workflow import nodes_of, template, to_api

TEMPLATES = {
    "horizon": "Teach the horizon",
    "palette": "Teach a palette",
    "line": "Teach line weight",
    "depth": "Teach depth",
}
HELD_OUT_SEEDS = range(1_000_000_000, 1_000_000_032)  # far from any seed the trainer draws
BAR_WIDTH = 32


class TrainingBar:
    """Follows the trainer node: a bar in the terminal, and how long the node ran (`seconds`)."""

    def __init__(self, node_id: str):
        self.node_id = node_id
        self.seconds = 0.0
        self._start = 0.0
        self._running = False
        self._note = ""

    def __call__(self, event: Event) -> None:
        data = event["data"]
        if event["type"] == "executing":
            self._executing(data["node"])
        elif event["type"] == "dual_process.progress":
            self._note = "judge " + ", ".join(f"{score:.0%}" for score in data["scores"])
        elif event["type"] == "progress" and data["node"] == self.node_id:
            self._draw(data["value"], data["max"])

    def _executing(self, node: str | None) -> None:
        if node == self.node_id:
            self._start, self._running = time.monotonic(), True
        elif self._running:
            self.seconds, self._running = time.monotonic() - self._start, False
            sys.stdout.write("\n")

    def _draw(self, value: int, most: int) -> None:
        filled = BAR_WIDTH * value // most
        bar = "#" * filled + "." * (BAR_WIDTH - filled)
        if sys.stdout.isatty():
            sys.stdout.write(f"\rtraining [{bar}] {value}/{most}  {self._note}   ")
        elif value % max(most // 10, 1) == 0:
            sys.stdout.write(f"training [{bar}] {value}/{most}  {self._note}\n")
        sys.stdout.flush()


def training_graph(client: ComfyClient, text: str, arguments: argparse.Namespace) -> Graph:
    """The template in API form, asking for what the command line asks for."""
    graph = to_api(template(TEMPLATES[arguments.question]), client.get_json("/object_info"))
    question, _what_has_to_stay = nodes_of(graph, "DualProcessQuestion")
    (trainer,) = nodes_of(graph, "DualProcessTrainer")
    (keeper,) = nodes_of(graph, "DualProcessSaveLoRA")
    graph[keeper]["inputs"]["filename_prefix"] = f"dual_process/{arguments.question}"
    graph[question]["inputs"] |= {"text": text, "answer": arguments.answer}
    graph[trainer]["inputs"]["seed"] = arguments.seed
    if arguments.steps is not None:
        graph[trainer]["inputs"]["steps"] = arguments.steps
    return graph


def with_ancestors(graph: Graph, node_ids: list[str]) -> Graph:
    """A copy of the part of a graph that these nodes need."""
    needed: Graph = {}
    waiting = list(node_ids)
    while waiting:
        node_id = waiting.pop()
        if node_id not in needed:
            needed[node_id] = deepcopy(graph[node_id])
            waiting += [value[0] for value in graph[node_id]["inputs"].values() if isinstance(value, list)]
    return needed


def held_out_graph(training: Graph, lora_name: str) -> Graph:
    """ComfyUI's own nodes drawing every held-out seed with and without the saved LoRA, as the trainer was told to.

    The pictures are shown by nodes named `before_00`, …, `after_31`.
    """
    trainer = training[nodes_of(training, "DualProcessTrainer")[0]]["inputs"]
    positive, latent = trainer["positive"], trainer["latent"]
    graph = with_ancestors(training, [trainer[name][0] for name in ("model", "vae", "positive", "latent")])
    graph[latent[0]]["inputs"]["batch_size"] = 1
    lora = {"model": trainer["model"], "lora_name": lora_name, "strength_model": 1.0}
    graph["lora"] = {"class_type": "LoraLoaderModelOnly", "inputs": lora}
    settings = {"steps": trainer["sampler_steps"], "cfg": trainer["cfg"], "denoise": 1.0}
    settings |= {name: trainer[name] for name in ("sampler_name", "scheduler")}
    settings |= {"positive": positive, "negative": trainer.get("negative", positive), "latent_image": latent}
    for name, model in (("before", trainer["model"]), ("after", ["lora", 0])):
        for index, seed in enumerate(HELD_OUT_SEEDS):
            shown = f"{name}_{index:02}"
            sampled, decoded = f"{shown}_latent", f"{shown}_image"
            graph[sampled] = {"class_type": "KSampler", "inputs": {**settings, "model": model, "seed": seed}}
            graph[decoded] = {"class_type": "VAEDecode", "inputs": {"samples": [sampled, 0], "vae": trainer["vae"]}}
            graph[shown] = {"class_type": "PreviewImage", "inputs": {"images": [decoded, 0]}}
    return graph


def train_and_draw(client: ComfyClient, text: str, arguments: argparse.Namespace, pictures: Path) -> tuple[str, float]:
    """Train, then draw the held-out pictures into a folder; returns the LoRA's name and the trainer's seconds."""
    graph = training_graph(client, text, arguments)
    bar = TrainingBar(nodes_of(graph, "DualProcessTrainer")[0])
    known = set(client.get_json("/models/loras"))
    client.run(graph, bar, timeout=3600)
    (lora_name,) = set(client.get_json("/models/loras")) - known
    print(f"drawing {len(HELD_OUT_SEEDS)} held-out seeds with and without the LoRA ...", flush=True)
    for node_id, shown in client.run(held_out_graph(graph, lora_name)).items():
        (pictures / f"{node_id}.png").write_bytes(client.picture(shown["images"][0]))
    return lora_name, bar.seconds


def steps_done(lora: Path) -> int:
    """How many steps a saved LoRA was trained for; the trainer stops early when the goal is held."""
    with safe_open(lora, "pt") as file:
        return json.loads(file.metadata()["dual_process"])["steps_done"]


def summary(report: dict, output: Path) -> str:
    """The report in four lines."""
    wanted, seeds = report["wanted_answer"], len(HELD_OUT_SEEDS)
    before, after, readable = (
        round(report[key] * seeds) for key in ("oracle_before", "oracle_after", "readable_after")
    )
    return (
        f'Taught: answer "{wanted}" to "{report["question"]}", in {report["train_seconds"]:.0f} s '
        f"({report['steps']} steps).\n"
        f'The judge says "{wanted}" with probability {report["judge_before"]:.2f} before and '
        f"{report['judge_after']:.2f} after, on {seeds} pictures it was not trained on.\n"
        f"Measured in the pixels: {before} of {seeds} pictures had it before, {after} after; "
        f"{readable} are still clean pictures.\n"
        f"Look at {output / 'before_after.png'}; the LoRA is {output / report['lora']}, all numbers are in report.json."
    )


def parse_arguments() -> argparse.Namespace:
    """The demo's command line."""
    parser = argparse.ArgumentParser(prog="dev.py demo", description=__doc__)
    parser.add_argument("--question", choices=TEMPLATES, default="horizon", help="what to teach")
    parser.add_argument("--answer", choices=["Yes", "No"], default="Yes", help="the answer the pictures should earn")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training run")
    parser.add_argument("--steps", type=int, help="training steps at most; the template's number when left out")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for pictures and report")
    return parser.parse_args()


def demonstrate(arguments: argparse.Namespace, log: Path) -> str:
    """Train, draw, measure, and leave everything in the output folder; returns the report in four lines.

    Raises OSError or RuntimeError when ComfyUI does not come up, ends, or does not carry out what it is sent.
    """
    start = time.monotonic()
    from transformers.utils.logging import disable_progress_bar

    from ..tiny.questions import QUESTIONS
    from ..vlm.loading import load_judge
    from ..vlm.question import Question
    from .measure import comparison_sheet, evaluate

    disable_progress_bar()
    output, pictures = arguments.output, arguments.output / "pictures"
    question = Question(QUESTIONS[arguments.question][0], arguments.answer)
    base = PACK / ".comfyui" / "base"
    base.mkdir(parents=True, exist_ok=True)
    print("starting ComfyUI ...", flush=True)
    with ComfyServer(base, log) as server, ComfyClient(server.url) as client:
        version = client.get_json("/system_stats")["system"]["comfyui_version"]
        lora_name, train_seconds = train_and_draw(client, question.text, arguments, pictures)
    lora = output / Path(lora_name).name
    shutil.copy(base / "models" / "loras" / lora_name, lora)
    comparison_sheet(pictures).save(output / "before_after.png")
    report = {"question": question.text, "wanted_answer": question.answer, "steps": steps_done(lora)}
    measured = evaluate(pictures, load_judge(PACK / "tiny" / "judge"), question, arguments.question)
    report |= {"train_seconds": train_seconds, "total_seconds": time.monotonic() - start, **measured}
    report |= {"lora": lora.name, "comfyui": version}
    report |= {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return summary(report, output)


def main() -> None:
    """Run the demo; see `parse_arguments` for its options. A failure is one sentence and exit code 1."""
    arguments = parse_arguments()
    try:
        (arguments.output / "pictures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"dev.py demo: --output {arguments.output} cannot be a folder ({error.strerror}): choose another one.")
    log = arguments.output / "comfyui.log"
    try:
        print(demonstrate(arguments, log))
    except (OSError, RuntimeError) as error:
        sys.exit(f"dev.py demo: {str(error).splitlines()[0]}\nWhat the server wrote is in {log}")


if __name__ == "__main__":
    main()
