"""Steps a second, peak memory and share of each phase at real sizes, ours against the published way; needs CUDA.

    python3 dev.py bench gpu --json gpu.json

Students and judges have the published shapes and random weights, made on the GPU: FLUX schnell (12 B, bf16 and fp8)
and SDXL, each with its own VAE's shape; Qwen2.5-VL of 7 B and 3 B and SmolVLM of 2 B, in bf16 and, where bitsandbytes
is installed, in 4 bits; 512 and 1024 px, three questions. ``default`` are the trainer's own steps, some with anchor and
prior, which recompute what the trainer chooses for the memory that is free (``chosen``); ``checkpointed`` recomputes
everything and ``plain`` nothing, without both. Peak and shares are of the first step, which has both. Ratios are ours
over the published way, of memory beyond what was held before the step; ``whole_peak_mb`` is with the weights. What does
not fit into the GPU's memory says so; where model and judge take turns, ``moving_seconds`` are what bringing each took,
once a step. ``--tiny`` runs the same code on tiny models, on a CPU too.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from dual_process.benchmarks.memory import MB
from dual_process.benchmarks.pairs import flux, idefics3, qwen2_5_vl, random_pair, smol_judge, start_comfyui
from dual_process.benchmarks.ways import DEFAULT, Ours, Published, machine, report
from dual_process.trainers.dual_process import HELD_EVERY
from dual_process.trainers.live_memory import LiveMemory
from dual_process.vlm.memory import out_of_memory

Made = TypeVar("Made")
QUESTIONS = 3
QWEN_TOWER = dict(
    depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, fullatt_block_indexes=[7, 15, 23, 31]
)
NO_ROOM = {"out_of_memory": True}
NO_GPU = "bench gpu needs an NVIDIA GPU, and torch sees none here: nothing was measured."


@dataclass(frozen=True)
class Shape:
    """A student: how its architecture is made, the dtype of its weights, its prompt's tokens (number, width)."""

    architecture: Callable
    dtype: torch.dtype
    tokens: tuple[int, int]


def flux_schnell():
    return flux(heads=24, double=19, single=38, head=128, context=4096)


def sdxl():
    from dual_process.tests import architectures as lab

    architecture = copy.deepcopy(lab.ARCHITECTURES["SDXL"])
    architecture.config.update(
        model_channels=320, num_res_blocks=[2, 2, 2], channel_mult=[1, 2, 4], context_dim=2048,
        transformer_depth=[0, 0, 2, 2, 10, 10], transformer_depth_middle=10,
        transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10],
    )  # fmt: skip
    return architecture


def qwen_7b(device: str):
    text = dict(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4,
    )  # fmt: skip
    return qwen2_5_vl(QWEN_TOWER, text, tie=False, dtype=torch.bfloat16, device=device)


def qwen_3b(device: str):
    text = dict(
        vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
        num_key_value_heads=2,
    )  # fmt: skip
    return qwen2_5_vl(QWEN_TOWER, text, tie=True, dtype=torch.bfloat16, device=device)


def smolvlm_2b(device: str):
    vision = dict(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=384,
        patch_size=14,
    )  # fmt: skip
    text = dict(
        vocab_size=49155, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32,
        num_key_value_heads=32,
    )  # fmt: skip
    tiles = dict(size={"longest_edge": 1536}, do_image_splitting=True)
    return idefics3(vision, text, scale_factor=3, size=tiles, tie=False, dtype=torch.bfloat16, device=device)


def tiny_judge(device: str):
    return smol_judge((1, 64), (1, 64), side=64)


STUDENTS = {
    "FLUX schnell 12B bf16": Shape(flux_schnell, torch.bfloat16, (256, 4096)),
    "FLUX schnell 12B fp8": Shape(flux_schnell, torch.float8_e4m3fn, (256, 4096)),
    "SDXL bf16": Shape(sdxl, torch.bfloat16, (77, 2048)),
}
JUDGES = {"Qwen2.5-VL-7B": qwen_7b, "Qwen2.5-VL-3B": qwen_3b, "SmolVLM-2B": smolvlm_2b}
SIDES = [512, 1024]
TINY_STUDENTS = {
    "tiny FLUX bf16": Shape(lambda: flux(heads=2, double=1, single=1), torch.bfloat16, (7, 48)),
    "tiny FLUX fp8": Shape(lambda: flux(heads=2, double=1, single=1), torch.float8_e4m3fn, (7, 48)),
}
TINY_SIDES = [64]


def real_vae(channels: int, device: str):
    """An AutoencoderKL of the published shape with random weights, made on ``device``."""
    import comfy.sd
    from comfy.ldm.modules.diffusionmodules.model import Decoder, Encoder

    from dual_process.tests.architectures import randomise

    config = dict(
        double_z=True, z_channels=channels, resolution=256, in_channels=3, out_ch=3, ch=128, ch_mult=[1, 2, 4, 4],
        num_res_blocks=2, attn_resolutions=[], dropout=0.0,
    )  # fmt: skip
    with torch.device(device):
        parts = nn.ModuleDict({"encoder": Encoder(**config), "decoder": Decoder(**config)})
        if channels == 4:  # those of Stable Diffusion have two more layers
            parts.update({"quant_conv": nn.Conv2d(8, 8, 1), "post_quant_conv": nn.Conv2d(4, 4, 1)})
    randomise(parts, seed=7, gain=0.5)
    return comfy.sd.VAE(sd=parts.state_dict())


def in_four_bits(judge):
    """The judge with every linear layer but the head quantised by bitsandbytes (nf4), as its loader does."""
    import bitsandbytes as bnb

    for module in list(judge.model.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is not nn.Linear or name == "lm_head":
                continue
            small = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, layer.bias is not None, layer.weight.dtype, quant_type="nf4"
            )
            small.weight = bnb.nn.Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4")
            small.bias = layer.bias
            setattr(module, name, small.to(layer.weight.device))
    return judge


class Gauge:
    """Seconds and peak megabytes of steps, on the GPU or, for tiny models, on the CPU."""

    def __init__(self, device: str):
        self.on_gpu = device == "cuda"

    def wait(self) -> None:
        """Until the GPU has done what it was given."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, way: Ours, step: int) -> float:
        """Of step number ``step``."""
        taken = []

        @contextmanager
        def measured():
            self.wait()
            start = time.perf_counter()
            yield
            self.wait()
            taken.append(time.perf_counter() - start)

        way.run(step, measured, step=step)
        return taken[0]

    def shares(self, way: Ours, seed: int) -> dict[str, float]:
        """Share of each phase in a step's time, 0..1; the GPU is waited for between phases."""
        marks: list[tuple[str, float]] = []

        def entered(phase: str) -> None:
            self.wait()
            marks.append((phase, time.perf_counter()))

        way.run(seed, nullcontext, entered)
        spent: dict[str, float] = {}
        for (phase, start), (_, end) in zip(marks, marks[1:]):
            spent[phase] = spent.get(phase, 0.0) + end - start
        return {phase: seconds / sum(spent.values()) for phase, seconds in spent.items()}

    def peaks_mb(self, way: Ours, seed: int) -> dict[str, float]:
        """Most memory that a step needs beyond what is held before it, and on a GPU the whole, weights included."""
        if not self.on_gpu:
            memory = LiveMemory()
            way.run(seed, lambda: memory)
            return {"peak_mb": memory.peak / MB}
        found = {}

        @contextmanager
        def measured():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            yield
            whole = torch.cuda.max_memory_allocated()
            found.update(peak_mb=(whole - before) / MB, whole_peak_mb=whole / MB)

        way.run(seed, measured)
        return found


def measure(make: Callable[[], Ours], gauge: Gauge, repeats: int) -> dict:
    """Steps a second, peak memory and shares of one way, and what it chose; or ``NO_ROOM``."""
    from dual_process.trainers.comfy_memory import DoesNotFit

    try:
        way = make()
        gauge.seconds(way, 1)
        steps = [gauge.seconds(way, 1 + i) for i in range(repeats)]
        found = {
            "steps_per_second": 1 / statistics.fmean(steps),
            **gauge.peaks_mb(way, 1),
            "shares": gauge.shares(way, 1),
        }
        if way.plan:
            found["chosen"] = way.plan.sentence()
        turns = way.student.turns
        return found | ({"moving_seconds": turns.seconds} if turns.apart else {})
    except RuntimeError as error:
        if not (out_of_memory(error) or isinstance(error, DoesNotFit)):
            raise
        return dict(NO_ROOM)
    finally:
        release()


def made(build: Callable[[], Made]) -> Made | None:
    """What ``build`` makes, or None where there is no room for it."""
    try:
        return build()
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        # what was made of it is held until the error is gone
    release()
    return None


def release() -> None:
    """Give freed memory back before something else is measured."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def by_default(pair) -> Ours:
    """Our step as the trainer takes it if nothing is changed there."""
    way = Ours(pair, QUESTIONS, checkpointed=True, settings=DEFAULT)
    way.settle()
    return way


def compare(pair, gauge: Gauge, repeats: int) -> dict:
    """Our step by default, with everything recomputed and with nothing, the published one, and the ratios."""
    ways = {
        "default": lambda: by_default(pair),
        "checkpointed": lambda: Ours(pair, QUESTIONS, checkpointed=True),
        "plain": lambda: Ours(pair, QUESTIONS, checkpointed=False),
        "published": lambda: Published(pair, QUESTIONS),
    }
    found = {name: measure(make, gauge, repeats) for name, make in ways.items()}
    published = found["published"]
    ratios = {}
    for name, one in found.items():
        if name != "published" and NO_ROOM not in (one, published):
            ratios[f"{name}: time"] = published["steps_per_second"] / one["steps_per_second"]
            ratios[f"{name}: memory"] = one["peak_mb"] / published["peak_mb"]
    return {**found, "ratios": ratios}


def student_model(shape: Shape, device: str):
    """The random MODEL of a shape; fp8 weights compute in bf16."""
    from dual_process.tests import architectures as lab

    compute = torch.bfloat16 if shape.dtype == torch.float8_e4m3fn else None
    return lab.assemble(shape.architecture(), dtype=shape.dtype, compute=compute, device=device)


def judges(builders: dict[str, Callable], device: str):
    """(name, judge) of every shape, and again in 4 bits where bitsandbytes is installed and there is a GPU; None for a
    judge that there is no room for."""
    four_bits = device == "cuda" and importlib.util.find_spec("bitsandbytes") is not None
    for name, build in builders.items():
        yield name, made(lambda: build(device))
        if four_bits:
            yield f"{name} 4-bit", made(lambda: in_four_bits(build(device)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--repeats", type=int, default=2 * HELD_EVERY, help="steps; means are reported")
    parser.add_argument("--tiny", action="store_true", help="tiny models instead, to try the code without a GPU")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.tiny:
        print(NO_GPU)
        if arguments.json:
            arguments.json.write_text(json.dumps({"skipped": NO_GPU}, indent=2) + "\n", encoding="utf-8")
        return
    start_comfyui()
    students, builders, sides = STUDENTS, JUDGES, SIDES
    if arguments.tiny:
        students, builders, sides = TINY_STUDENTS, {"tiny judge": tiny_judge}, TINY_SIDES
    gauge, result = Gauge(device), {"machine": machine(), "tiny": arguments.tiny, "ratios": {}}
    with torch.inference_mode():
        for student, shape in students.items():
            architecture, model = shape.architecture(), made(lambda: student_model(shape, device))
            if model is None:
                result[student] = dict(NO_ROOM)
                continue
            vae = None if arguments.tiny else real_vae(architecture.latent[1], device)
            for judge_name, judge in judges(builders, device):
                for side in sides if judge else ():
                    name = f"{student}, {judge_name}, {side} px"
                    pair = random_pair(name, architecture, judge, side, tokens=shape.tokens, model=model, vae=vae)
                    result[name] = found = compare(pair, gauge, arguments.repeats)
                    result["ratios"] |= {f"{name}: {what}": ratio for what, ratio in found.pop("ratios").items()}
                    print(f"{name}: {found}", flush=True)
                    if arguments.json:  # after each pair, so that a run that is ended keeps what it has
                        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
                    del pair
                if judge is None:
                    result[f"{student}, {judge_name}"] = dict(NO_ROOM)
                del judge
                release()
            del model, vae
            release()
    report(result, arguments.json)


if __name__ == "__main__":
    main()
