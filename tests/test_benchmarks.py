"""The benchmarks of a step, on models so small that only their code is tested, and the accounting they rely on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
THREE = ", three questions"
PHASES = ["rollout", "generator forward", "VAE forward", "judge forward", "judge backward"]


@pytest.fixture
def pair(comfy):
    """A student and a judge of two layers, 64 px."""
    from dual_process.benchmarks.pairs import random_pair, sd3, smol_judge

    with torch.inference_mode():
        yield random_pair("tiny", sd3(2), smol_judge((1, 64), (1, 64), side=64), side=64)


def test_step(pair):
    from dual_process.benchmarks.step import compare

    found = compare(pair, repeats=1)
    assert set(found["steps"]) > {
        "ideal",
        "plain",
        "default, holding",
        "default, between",
        "published, three questions",
    }
    assert all(ratio > 0 for ratio in found["ratios"].values()) and found["ratios"]["outside_torch"] < 1
    assert set(found["chosen"]) == {f"{way}{asked}" for way in ("automatic", "default") for asked in ("", THREE)}


def test_the_ideal_is_three_models_there_and_back_and_the_rollout(pair, monkeypatch):
    from dual_process.benchmarks.ways import Ideal, K
    from dual_process.trainers.comfy_memory import gradients

    ideal, runs = Ideal(pair), []
    forward = ideal._forward
    monkeypatch.setattr(ideal, "_forward", lambda name: runs.append((name, torch.is_grad_enabled())) or forward(name))
    ideal.run()
    assert runs == [("generator", False)] * K + [(name, True) for name in ("generator", "VAE", "judge")]
    with gradients():
        found = [ideal.there_and_back(name) for name in ideal.calls]
    assert len(found) == 3 and all(gradient.isfinite().all() and gradient.any() for gradient in found)


def test_the_optimiser_needs_no_8_bits(comfy):
    """On FLUX schnell's published shape and with the trainer's rank, they would save less than half a gigabyte."""
    import comfy.supported_models

    from dual_process.benchmarks.gpu import flux_schnell
    from dual_process.tests.architectures import known_to_this_comfyui
    from dual_process.trainers.lora import lora_targets

    shape = comfy.supported_models.FluxSchnell(known_to_this_comfyui(flux_schnell()))
    shape.set_inference_dtype(torch.bfloat16, None)
    network = shape.get_model({}, "", device="meta").diffusion_model
    size = sum(16 * (layer.in_features + layer.out_features) for layer in lora_targets(network).values())
    assert size == 56_033_280 and 2 * 3 * size < 0.5e9, "two moments, of one byte instead of four"


def test_students_of_the_gpu_benchmark_have_the_published_shapes(comfy):
    """Their parameters are as many as those of the published weights; one forward fits together."""
    import comfy.supported_models
    from torch._subclasses.fake_tensor import FakeTensorMode

    from dual_process.benchmarks.gpu import STUDENTS
    from dual_process.benchmarks.pairs import parameters
    from dual_process.tests.architectures import known_to_this_comfyui

    published = {"FLUX": 11_891_178_560, "SDXL": 2_567_463_684}
    with FakeTensorMode():
        for name, shape in STUDENTS.items():
            architecture = shape.architecture()
            config = getattr(comfy.supported_models, architecture.model_class)(known_to_this_comfyui(architecture))
            config.set_inference_dtype(torch.bfloat16, None)
            model = config.get_model({}, "", device="cpu")
            assert parameters(model.diffusion_model) == published[name.split()[0]]
            extra = {key: torch.zeros(size) for key, size in architecture.extra.items()}
            tensors = [torch.zeros(1, architecture.latent[1], 64, 64), torch.zeros(1), torch.zeros(1, *shape.tokens)]
            tensors.append(model.encode_adm(device="cpu", **extra))
            drawn = model.diffusion_model(*(tensor.to(torch.bfloat16) for tensor in tensors))
            assert drawn.shape == tensors[0].shape


def test_judges_and_vaes_of_the_gpu_benchmark_have_the_published_shapes(comfy):
    from dual_process.benchmarks.gpu import JUDGES, real_vae
    from dual_process.benchmarks.pairs import parameters

    judges = {name: parameters(build("meta").model) for name, build in JUDGES.items()}
    published = {"Qwen2.5-VL-7B": 8_292_166_656, "Qwen2.5-VL-3B": 3_754_622_976, "SmolVLM-2B": 2_246_272_880}
    assert judges == published
    vaes = {channels: parameters(real_vae(channels, "cpu").first_stage_model) for channels in (4, 16)}
    assert vaes == {4: 83_653_863, 16: 83_819_683}


def test_the_published_way_teaches_the_same(pair):
    """Without noise before the judge, and with pictures within 0..1, the gradients are equal."""
    from dual_process.benchmarks.ways import Ours, Published
    from dual_process.trainers.dual_process import Settings

    decoder = pair.student(False).vae.first_stage_model
    own = decoder.decode
    decoder.decode = lambda z: own(z).tanh()
    gradients = []
    for way in (Ours(pair, 3, False, Settings(anchor=0.0, prior=0.0, judge_noise=0.0)), Published(pair, 3)):
        kept: list[torch.Tensor] = []
        gradients.append(kept)

        def keep(phase, way=way, kept=kept):
            if phase == "optimiser":
                kept += [p.grad.clone() for p in way.student.lora.parameters() if p.grad is not None]

        way.run(0, entered=keep)
    ours, published = (torch.cat([g.flatten() for g in kept]) for kept in gradients)
    assert ours.norm() > 0 and torch.allclose(ours, published, atol=1e-4 * ours.abs().max())


def test_live_memory_by_hand():
    from dual_process.trainers.live_memory import LiveMemory

    weight = torch.ones(256, 256)
    with LiveMemory() as memory:
        memory.entered("first")
        kept = weight.t() * 2
        assert memory.live == 2**18, "a view of what was there before is nothing new"
        memory.entered("second")
        passing = kept + 1
        view = passing[0]
        del passing
        assert memory.live == 2 * 2**18, "a view keeps the whole"
        del view
        kept.add_(1)
        assert memory.live == 2**18
    assert memory.peaks == {"first": 2**18, "second": 2 * 2**18} and memory.peak == 2 * 2**18
    x = torch.ones(256, 256, requires_grad=True)
    with LiveMemory() as memory:
        y = (x * 2).sin().sum()
        assert memory.live == 2**18 + 4, "what autograd saved is alive"
        y.backward()
        del y
        assert memory.live == 2**18, "the gradient"


def test_memory(pair):
    from dual_process.benchmarks.memory import compare

    found = compare(pair)
    ours, published = found["peak_mb"]["checkpointed"], found["peak_mb"]["published"]
    assert set(ours) == {"whole", *PHASES, "VAE backward", "generator backward", "optimiser"}
    assert "holding" in found["peak_mb"]["default"] and ours["whole"] == max(ours.values())
    assert ours["whole"] < published["whole"]
    assert ours["whole"] <= found["peak_mb"]["automatic"]["whole"]
    for name in ("plain", "automatic", "checkpointed", "default"):
        assert found["ratios"][f"{name}_predicted_over_measured"] == pytest.approx(1, rel=0.15), name


def test_scaling(comfy, tmp_path):
    from dual_process.benchmarks import scaling

    assert scaling.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    with torch.inference_mode():
        found = {"batch": scaling.sweep("batch", [1, 2], repeats=1)}
    assert found["batch"]["sizes"] == [1, 2] and set(found["batch"]["exponents"]) == {"cpu_seconds", "peak_mb"}
    scaling.plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def run_gpu(tmp_path: Path, comfyui: Path, *options: str) -> dict:
    environment = {**os.environ, "COMFYUI_PATH": str(comfyui), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--json", str(tmp_path / "gpu.json"), *options]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return json.loads((tmp_path / "gpu.json").read_text())


def test_gpu_without_one(tmp_path, comfyui):
    assert run_gpu(tmp_path, comfyui) == {
        "skipped": "bench gpu needs an NVIDIA GPU, and torch sees none here: nothing was measured."
    }


def test_gpu_tiny(tmp_path, comfyui):
    found = run_gpu(tmp_path, comfyui, "--tiny", "--repeats", "1")
    one = found["tiny FLUX fp8, tiny judge, 64 px"]["default"]
    assert found["tiny"] and one["steps_per_second"] > 0 and one["peak_mb"] > 0
    assert sum(one["shares"].values()) == pytest.approx(1)
    assert one["chosen"].startswith("Keeping everything: "), "as the trainer does where there is room"
    assert "tiny FLUX bf16, tiny judge, 64 px: default: memory" in found["ratios"]


def test_a_4_bit_judge_made_in_inference_mode(pair):
    """As ``bench gpu`` makes it."""
    pytest.importorskip("bitsandbytes")
    from dual_process.benchmarks.gpu import in_four_bits
    from dual_process.benchmarks.ways import Ours, Published, peaks

    in_four_bits(pair.judge.judge)
    assert peaks(Ours(pair, 2, True))["whole"] < peaks(Published(pair, 2))["whole"]


def test_what_does_not_fit_on_a_gpu_says_so(comfy):
    from dual_process.benchmarks import gpu
    from dual_process.trainers.comfy_memory import DoesNotFit

    def fail(error):
        raise error("too large")

    for error in (torch.OutOfMemoryError, DoesNotFit):
        assert gpu.measure(lambda: fail(error), gpu.Gauge("cpu"), 1) == {"out_of_memory": True}
    builders = {"large": lambda device: fail(torch.OutOfMemoryError), "small": lambda device: "a judge"}
    assert dict(gpu.judges(builders, "cpu")) == {"large": None, "small": "a judge"}


def test_compile(pair, monkeypatch):
    """With torch's eager backend, which translates the blocks and leaves the kernels as they are."""
    from dual_process.benchmarks.compile import blocks_of, measure
    from dual_process.benchmarks.ways import Ideal
    from dual_process.trainers.comfy_memory import gradients

    compiled, real = [], torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda block: compiled.append(block) or real(block, backend="eager")
    )
    ways = Ideal(pair)
    with gradients():
        for name in ("generator", "judge"):
            found = measure(ways, name, repeats=1)
            assert compiled[-len(blocks_of(ways, name)) :] == blocks_of(ways, name)
            assert found["gradient_error"] < 1e-5 and found["cpu_seconds_to_compile"] > 0
            saves = found["cpu_seconds_compiled"] < found["cpu_seconds"]
            assert (found["pays_back_after_steps"] is not None) == saves


def test_rows_without_a_look_or_from_an_earlier_file_are_summed_up():
    from dual_process.benchmarks.control import summary
    from dual_process.demo.measure import DRIFT_METRICS

    found = {"oracle": 1.0, "readable": 0.5, "changes": dict.fromkeys((*DRIFT_METRICS, "diversity"), 0.0)}
    rows = [{"row": "taught", "seed": seed, "steps": 10, "horizon Yes": found} for seed in range(3)]
    rows[1]["drift"], rows[2]["drift"], rows[2]["strangeness"] = 0.2, None, 2.1
    assert summary(rows).endswith("| +0% | 20% | 2.1 | 10 |") and summary(rows[:1]).endswith("| +0% | - | - | 10 |")


def test_what_else_moved_is_counted_among_the_clean_pictures():
    from dual_process.benchmarks.table import others
    from dual_process.tiny import scenes

    measures = scenes.attributes(torch.full((4, 8), 0.9))
    measures["palette"][:2], measures["sun_x"][:3] = 0.1, -3.0
    pictures = torch.cat([scenes.draw(measures), torch.zeros(4, 3, 64, 64)])
    assert others(pictures) == {"horizon": 1.0, "palette": 0.5, "line": 1.0, "depth": 1.0, "sun": 0.25}


def test_where_no_picture_is_clean_nothing_is_said_of_them():
    from dual_process.benchmarks.guided import followed, moved, summary
    from dual_process.benchmarks.table import others

    black = torch.zeros(2, 3, 64, 64)
    assert others(black) == {} and followed(black, "line", 2.0) == {"readable": 0.0}
    rows = [{"row": f"guide, line {n}", "target": n, "before": {}, "after": followed(black, "line", n)} for n in (1, 2)]
    rows.append({"row": "before and after, line", "moved": moved(black, black, "line", 0.3)})
    assert not any("line" in text for text in summary(rows).splitlines())


def test_stacking_needs_the_loras_of_the_rows(tmp_path):
    from dual_process.benchmarks.control import stacked
    from dual_process.benchmarks.table import Table

    with pytest.raises(SystemExit, match="needs control_horizon_Yes_1.safetensors, control_palette_No_1.safetensors"):
        stacked(None, Table(tmp_path / "control.json"), 1)


def test_a_real_checkpoint_is_not_asked_about_two_balls(monkeypatch, capsys):
    from dual_process.benchmarks import commonsense
    from dual_process.tiny.questions import KEEP_QUESTION

    monkeypatch.setattr(sys, "argv", ["commonsense", "--json", "x.json"])
    assert commonsense.parse_arguments().keep == KEEP_QUESTION
    sys.argv += ["--checkpoint", "flux.safetensors"]
    with pytest.raises(SystemExit):
        commonsense.parse_arguments()
    assert "--checkpoint needs --keep" in capsys.readouterr().err
    sys.argv += ["--keep", "", "--side", "512", "--learning-rate", "1e-4"]
    assert commonsense.parse_arguments().keep == ""


def test_rows_of_common_sense_are_taught_once(comfy, tmp_path, monkeypatch, capsys):
    from dual_process.benchmarks import commonsense
    from dual_process.benchmarks.bundled import Laboratory

    rows = json.loads((BENCHMARKS / "commonsense_scenes.json").read_text())
    (tmp_path / "rows.json").write_text(json.dumps([rows[0], {**rows[6], "property": None}]))
    results, learn, taught = tmp_path / "results.json", Laboratory.learn, []
    monkeypatch.setattr(Laboratory, "learn", lambda *given, **how: taught.append(how) or learn(*given, **how))
    monkeypatch.setattr(commonsense, "HELD_OUT", 2)
    given = ["--json", results, "--rows", tmp_path / "rows.json", "--steps", 1, "--batch", 2]
    given += ["--second-judge", BENCHMARKS.parent / "tiny" / "judge_of_guides"]
    monkeypatch.setattr(sys, "argv", ["commonsense", *map(str, given)])
    commonsense.main()
    first = json.loads(results.read_text())
    assert [(row["prompt"], list(row["as wanted"]["LoRA"])) for row in first] == [
        (rows[0]["prompt"], ["judge", "second judge", "oracle"]),
        (rows[6]["prompt"], ["judge", "second judge"]),
    ]
    assert [how["prompts"] for how in taught] == [[rows[0]["prompt"]], [rows[6]["prompt"]]]
    table = capsys.readouterr().out[-600:].partition("| share")[2]
    commonsense.main()
    assert len(taught) == 2 and json.loads(results.read_text()) == first
    assert capsys.readouterr().out.endswith(table) and "| LoRA |" in table


def test_the_scene_that_a_guide_is_made_for_has_what_the_guide_asks():
    from dual_process.benchmarks.guided import GUIDES, followed, wanted_scene
    from dual_process.tiny.oracles import measure
    from dual_process.tiny.teach_guides import KINDS

    for kind, (drawing, values) in GUIDES.items():
        about = KINDS[kind].about
        found = [measure(wanted_scene(about, value)) for value in values]
        assert all(one["readable"] for one in found)
        drawn = [drawing(wanted_scene(about, value)[0], value).draw(64, 64) for value in values]
        assert len({one.numpy().tobytes() for one in drawn}) == 5
        if about != "palette":
            assert [one[about].item() for one in found] == pytest.approx(values, abs=0.15)
    pictures = torch.cat([wanted_scene("line", value) for value in (2.0, 3.0)] + [torch.zeros(2, 3, 64, 64)])
    thin, thick = measure(pictures)["line"][:2].tolist()
    assert followed(pictures, "line", thin) == {
        "error": pytest.approx((thick - thin) / 2),
        "mean": pytest.approx((thick + thin) / 2),
        "readable": 0.5,
    }


def test_guides_are_summed_up_over_their_values():
    from dual_process.benchmarks import control
    from dual_process.benchmarks.guided import summary
    from dual_process.demo.measure import DRIFT_METRICS

    rows = [
        {"row": f"guide, horizon {target}", "seed": seed, "target": target, "before": {"error": 0.2}}
        | {"after": {"error": error, "mean": target + error, "readable": 1.0}}
        | {"changes": dict.fromkeys(DRIFT_METRICS, 0.01) | {"saturation": -target, "diversity": 0.1 - target}}
        for seed, error in enumerate((0.05, 0.1, 0.0))
        for target in (0.3, 0.5, 0.7)
    ]
    line = summary(rows).splitlines()[2]
    assert line.startswith(
        "| horizon | 0.30, 0.50, 0.70 | 0.35, 0.55, 0.75 | 0.200 | 0.050 | 75% | 50% | 1.00 | 1.00 |"
    )
    assert line.endswith("| 100.0% | saturation 70% | -60% |")
    rows[0]["after"]["mean"] = 0.9
    assert summary(rows).splitlines()[2].split(" | ")[8] == "-0.43"
    assert len(control.summary(rows).splitlines()) == 2, "these are no rows of its table"


def test_what_moved_is_told_seed_by_seed():
    from dual_process.benchmarks.guided import moved, summary
    from dual_process.tiny import scenes
    from dual_process.trainers.guards import changes

    heights = torch.tensor([0.3, 0.4, 0.6])
    measures = scenes.attributes(torch.full((3, 8), 0.25))
    lower = heights + torch.tensor([0.1, 0.1, 0])
    before, after = (scenes.draw(measures | {"horizon": level}) for level in (lower, heights))
    found = moved(before, after, "horizon", -0.04)
    assert found == {"mean": pytest.approx(-0.2 / 3, abs=0.01), "moved": pytest.approx(2 / 3), "readable": 1.0}
    assert moved(after, before, "horizon", 0.04)["moved"] == pytest.approx(2 / 3)
    row = {"row": "before and after, horizon", "steps": 90, "moved": found, "changes": changes(before, after)}
    worse = row | {"steps": 110, "moved": {"mean": 0.0, "moved": 1 / 3, "readable": 0.5}}
    told = summary([row, worse]).splitlines()[-1]
    assert told.startswith("| horizon | -0.03 | 50.0% | 33.3% | 75.0% | 50.0% | 100 | ")
    assert told.endswith(f"{row['changes']['diversity']:+.0%} |")


@pytest.mark.parametrize("held_at, looks, seconds", [(4, True, 6.0), (4, False, 4.0), (8, True, 10.0), (9, True, None)])
def test_until_held_counts_what_it_says(monkeypatch, held_at, looks, seconds):
    """Steps of a second and looks of another, after steps 4 and 8; the last look comes after the last step."""
    from dual_process.benchmarks import held
    from dual_process.tiny import scenes
    from dual_process.trainers.dual_process import Run, Settings
    from dual_process.trainers.looks import Check

    low, high = (scenes.render(torch.full((10, 8), 0.25) + torch.eye(8)[0] * up) for up in (0.0, 0.5))
    now = [0.0]
    monkeypatch.setattr(held.time, "process_time", lambda: now[0])

    def train(student, judge, objective, settings, watch):
        run = Run(checks=[Check(0, [], low)])
        for step in range(1, 9):
            now[0] += 1
            watch(run, None)
            if step % 4 == 0:
                now[0] += 1
                run.checks.append(Check(step, [], high if step >= held_at else low))
        return run

    monkeypatch.setattr(held, "train", train)
    judge = SimpleNamespace(judge=None, patcher=None)
    student = SimpleNamespace(run=lambda loop, beside: loop())
    laboratory = SimpleNamespace(student=lambda seed: student, judge=judge)
    found = held.until_held(laboratory, "horizon Yes", Settings(), None, looks)
    assert found["seconds"] == seconds and found["steps"] == (4 if held_at == 4 else 8)
    assert found["shares"] == [float(step >= held_at) for step in (4, 8)][: len(found["shares"])]
    assert set(found["clean"]) == {1.0}


def test_guides_are_shown_above_what_came_of_them(tmp_path):
    from PIL import Image
    from safetensors.torch import save_file

    from dual_process.benchmarks.guided import guides, save_examples
    from dual_process.benchmarks.table import Table

    table = Table(tmp_path / "rows.json")
    names = [name for name, *_ in guides()][3:5]
    for name in names:
        save_file({"name": torch.full((1,), float(len(name)))}, table.lora(name, 0))
    drawn = []

    def draw(loras=(), count=1, batch=16):
        drawn.append([lora["name"].item() for lora in loras])
        return torch.full((count, 3, 64, 64), 0.5)

    save_examples(table, SimpleNamespace(draw=draw))
    assert drawn == [[], [len(names[0])], [len(names[1])]]
    with Image.open(tmp_path / "rows_guides.png") as sheet:
        assert sheet.size == (2 * 66 + 2, 5 * 64 + 4)
