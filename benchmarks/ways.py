"""Three ways to take one training step on the same modules: ours, the published one, and the least it could cost."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile, record_function

from dual_process.benchmarks.pairs import Pair
from dual_process.trainers.dual_process import HELD_EVERY, Settings, one_pass
from dual_process.trainers.live_memory import LiveMemory
from dual_process.trainers.memory_plan import MemoryPlan, plan_memory
from dual_process.vlm.plain import extended, repeated

K = 1  # of four sampler steps: one step of rollout goes before the one that is learned from
PLAIN = Settings(anchor=0.0, prior=0.0)  # what the published step does too
DEFAULT = Settings()


class Ours:
    """Our step, as the trainer takes it.

    Args:
        pair: student and judge.
        questions: how many are asked.
        checkpointed: recompute all blocks of generator, VAE and judge in backward; ``settle`` may choose otherwise.
        settings: with or without anchor and prior, which come in some of the steps, see ``Settings.at``.
    Attributes:
        plan: what ``settle`` chose, None before.
        apart: whether it chose to take turns.
    """

    def __init__(self, pair: Pair, questions: int, checkpointed: bool, settings: Settings = PLAIN):
        self.judge, self.settings = pair.judge, settings
        self.student, self.objective = pair.student(checkpointed), pair.objective(questions)
        self.optimizer = torch.optim.AdamW(self.student.lora.parameters(), lr=1e-5, weight_decay=0.0)
        self.plan: MemoryPlan | None = None
        self.apart = False

    def run(
        self, seed: int, measured=nullcontext, entered: Callable[[str], None] = lambda phase: None, step: int = 1
    ) -> None:
        """Take step number ``step``; ComfyUI's preparation around it stays outside of the context ``measured()``.

        ``entered`` is told the name of every phase as it begins.
        """
        student = Watched(self.student, entered)

        def loop() -> None:
            if self.apart:
                student.turns.part()
                student.turns.need(student.model)
            judge = WatchedJudge(student.in_turn(self.judge), entered)
            student.use_prompt(seed % student.prompts)
            with measured():
                entered("rollout")
                noise = student.noise(seed)
                self.learn(student, judge, noise, student.roll(noise, K), seed, step)
                entered("optimiser")
                torch.nn.utils.clip_grad_norm_(student.lora.parameters(), self.settings.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
                entered("")

        self.student.run(loop, beside=[self.judge.patcher])

    def settle(self, free: float | None = None) -> MemoryPlan:
        """Recompute what the trainer chooses, and take turns where it does, from now on.

        Args:
            free: bytes beside the weights; None: what the device has.
        """
        if free is not None:
            self.student.free_memory = lambda wanted=0: free

        def choose() -> None:
            judge = self.student.in_turn(self.judge)
            self.plan = plan_memory(self.student, judge, self.objective, self.settings)
            self.apart = self.student.takes_turns

        self.student.run(choose, beside=[self.judge.patcher])
        return self.plan

    def learn(self, student, judge, noise: Tensor, x: Tensor, seed: int, step: int) -> None:
        """Add the loss's gradient to the LoRA's, from ``x`` at σ_K."""
        rng = torch.Generator().manual_seed(seed)
        one_pass(student, judge, self.objective, self.settings.at(step), rng, noise, x, K)


class Published(Ours):
    """The reference's way: one graph from the answers to the LoRA, a whole pass of the judge for each question, the
    logits of all positions, nothing recomputed. The LoRA, and the clones without which ComfyUI's blocks have no
    gradient, are those of ours."""

    def __init__(self, pair: Pair, questions: int):
        super().__init__(pair, questions, checkpointed=False)

    def learn(self, student, judge, noise: Tensor, x: Tensor, seed: int, step: int) -> None:
        if student.takes_turns:
            raise torch.OutOfMemoryError("one graph through everything needs everything at once")
        image = student.decode(student.predict(x, K))
        losses = [judge.whole_pass(image, question) for question in self.objective.questions]
        torch.stack(losses).mean().backward()


class Ideal:
    """The least that a step can cost: bare forward and backward of the three models on the tensors of our own step with
    one question, gradients for activations only, and the rollout that every method needs. No LoRA, no loop, no
    preparation of the picture for the judge."""

    def __init__(self, pair: Pair):
        student = pair.student(False)
        self.network, self.vae = student.model.model.diffusion_model, student.vae.first_stage_model
        self.judge = pair.judge.judge.model
        self.calls: dict[str, tuple[tuple, dict]] = {}

        def loop() -> None:
            noise = student.noise(0)
            x = student.roll(noise, K)
            with self._recorded():
                image = student.decode(student.predict(x, K))
                pair.objective(1)(pair.judge.judge, image)

        student.run(loop, beside=[pair.judge.patcher])

    def run(self, measured=nullcontext) -> None:
        """Run the three models forward and backward, the generator ``K`` times more without gradients."""
        from dual_process.trainers.comfy_memory import gradients

        with gradients(), measured():
            for name in ("generator", "VAE", "judge"):
                self._share(name)

    def there_and_back(self, name: str) -> Tensor:
        """Run one model forward and backward; the gradient with respect to the activations it is given."""
        given, made = self._forward(name)
        return torch.autograd.grad(made, given, torch.ones_like(made))[0]

    def _share(self, name: str) -> None:
        """What one model does in a step; the generator has the rollout too."""
        with torch.no_grad():
            for _ in range(K if name == "generator" else 0):
                self._forward(name)
        self.there_and_back(name)

    def seconds_of_each(self) -> dict[str, float]:
        """CPU seconds that each model takes of the ideal step, median of three: bare forward and backward, for the
        generator with its ``K`` times more of the rollout."""
        from dual_process.trainers.comfy_memory import gradients

        def once(name: str) -> float:
            start = time.process_time()
            self._share(name)
            return time.process_time() - start

        with gradients():
            return {name: statistics.median(once(name) for _ in range(3)) for name in self.calls}

    def _forward(self, name: str) -> tuple[Tensor, Tensor]:
        """The activations a model is given, and what it makes of them."""
        args, kwargs = self.calls[name]
        if name == "judge":
            given = kwargs["pixel_values"].detach().requires_grad_()
            return given, self.judge(**{**kwargs, "pixel_values": given}).logits
        given = args[0].detach().requires_grad_()
        model = self.network if name == "generator" else self.vae.decode
        return given, model(given, *args[1:], **kwargs)

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """Keep what the models are called with."""

        def keep(name: str):
            return lambda _, args, kwargs: self.calls.__setitem__(name, (args, kwargs))

        handles = [
            self.network.register_forward_pre_hook(keep("generator"), with_kwargs=True),
            self.judge.register_forward_pre_hook(keep("judge"), with_kwargs=True),
        ]
        decode = self.vae.decode
        self.vae.decode = lambda z: (self.calls.__setitem__("VAE", ((z,), {})), decode(z))[1]
        try:
            yield
        finally:
            self.vae.decode = decode
            for handle in handles:
                handle.remove()


class Watched:
    """A student that tells which phase of a step begins, and otherwise is the student."""

    def __init__(self, student, entered: Callable[[str], None]):
        self._student, self._entered = student, entered

    def __getattr__(self, name: str):
        return getattr(self._student, name)

    def predict(self, x: Tensor, k: int) -> Tensor:
        self._entered("generator forward" if torch.is_grad_enabled() else "holding")
        x0 = self._student.predict(x, k)
        if x0.requires_grad:
            x0.register_hook(lambda _: self._entered("generator backward"))
        return x0

    def decode(self, x0: Tensor) -> Tensor:
        self._entered("VAE forward")
        image = self._student.decode(x0)
        if image.requires_grad:
            image.register_hook(lambda _: self._entered("VAE backward"))
        return image


class WatchedJudge:
    """A judge that tells when it looks and when its backward begins, and otherwise is the judge."""

    def __init__(self, judge, entered: Callable[[str], None]):
        self._judge, self._entered = judge, entered

    def __getattr__(self, name: str):
        return getattr(self._judge, name)

    def log_likelihood(self, *args) -> Tensor:
        self._entered("judge forward")
        scores = self._judge.log_likelihood(*args)
        self._entered("judge backward")
        return scores

    def whole_pass(self, image: Tensor, question) -> Tensor:
        """Cross-entropy of the wanted answer, from one pass of the whole model with the logits of all positions."""
        self._entered("judge forward")
        judge, rows = self._judge, image.shape[0]
        prompt = judge.prompts.encode(question.text, question.answer, (tuple(image.shape[-2:]),))
        text = repeated(extended(prompt.inputs, prompt.answer[:-1]), rows, judge.device)
        logits = judge.model(**text, **judge._pixels([image]), use_cache=False).logits.float()
        wanted = torch.tensor(prompt.answer, device=logits.device).expand(rows, -1)
        loss = cross_entropy(logits[:, -wanted.shape[1] :].flatten(0, 1), wanted.flatten())
        self._entered("judge backward")
        return loss


def peaks(way: Ours) -> dict[str, int]:
    """Bytes at the peak of each phase of a step, and of the ``whole`` step; an earlier step has warmed up."""
    way.run(0)
    memory = LiveMemory()
    way.run(0, lambda: memory, memory.entered)
    return {"whole": memory.peak, **{phase: peak for phase, peak in memory.peaks.items() if phase}}


def interleaved(ways: dict[str, Callable], repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds by the clock and of CPU of each way, taken in turn ``repeats`` times after one round to warm up.

    A way is called with a context manager to put around what counts. CPU seconds are those of all threads together,
    also of those that wait for the others: measure with one thread, which a busy machine hardly distorts.
    """
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(1 + repeats):
        for name, way in ways.items():

            @contextmanager
            def measured(taken=rounds[name]) -> Iterator[None]:
                start = time.perf_counter(), time.process_time()
                yield
                taken.append((time.perf_counter() - start[0], time.process_time() - start[1]))

            way(measured)
    medians = {name: [statistics.median(kind) for kind in zip(*taken[1:])] for name, taken in rounds.items()}
    return {name: dict(zip(("seconds", "cpu_seconds"), both)) for name, both in medians.items()}


def outside_torch(way: Ours) -> float:
    """Share of the time of ``HELD_EVERY`` steps, 0..1, in neither a torch operator nor the preparation of pictures for
    the judge.

    The profiler's own time is in it.
    """
    taken = []

    @contextmanager
    def measured() -> Iterator[None]:
        with profile(activities=[ProfilerActivity.CPU]) as found:
            start = time.perf_counter()
            yield
            seconds = time.perf_counter() - start
        taken.append((sum(event.self_cpu_time_total for event in found.key_averages()) / 1e6, seconds))

    inputs = way.judge.judge.prompts.inputs
    inputs.pixels = record_function("preparation of pictures")(inputs.pixels)
    try:
        for step in range(1 + HELD_EVERY):  # the first warms up
            way.run(0, measured, step=step)
    finally:
        del inputs.pixels
    in_torch, seconds = map(sum, zip(*taken[1:]))
    return 1 - in_torch / seconds


def machine() -> dict[str, object]:
    """What the numbers were measured on."""
    from comfyui_version import __version__ as comfyui

    cpu = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), cpu)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "comfyui": comfyui}
    return {"cpu": cpu, "cores": os.cpu_count(), "torch_threads": torch.get_num_threads(), "gpu": gpu, **versions}


def report(result: dict, path: Path | None) -> None:
    """Print a result, and write it to ``path``."""
    text = json.dumps(result, indent=2)
    print(text)
    if path:
        path.write_text(text + "\n", encoding="utf-8")
