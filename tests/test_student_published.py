"""Our training step against the published one: same weights, same noise, same question."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity

from dual_process.tests.gradients import give_lora_a_value
from dual_process.trainers.objective import LIKELIHOOD, Objective
from dual_process.vlm.question import Question

reference = pytest.importorskip("dual_process.tests.reference_algorithm", reason="needs diffusers and PEFT")

QUESTION = "Is the line thick?"
SPOKEN = " Yes"  # as the judge's chat template writes a "Yes" that the assistant has said
RANK = 4
NAMES = {  # of our layers in a double block -> theirs, fused or not
    "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "img_attn.proj": ["attn.to_out.0"],
    "txt_attn.proj": ["attn.to_add_out"],
    "img_mlp.0": ["ff.net.0.proj"],
    "img_mlp.2": ["ff.net.2"],
    "txt_mlp.0": ["ff_context.net.0.proj"],
    "txt_mlp.2": ["ff_context.net.2"],
}


class Pair:
    """The tiny FLUX schnell as a ComfyUI student and as a diffusers model, with the same LoRA and the same judge."""

    def __init__(self, lab):
        import comfy.utils

        scale = reference.WEIGHT * reference.ALPHA_PER_RANK
        self.student = lab.build_student(
            "FLUX schnell", sigmas=torch.tensor([1.0, 0.0]), cfg=1.0, rank=RANK, alpha=scale * RANK,
            targets="^double_blocks",
        )  # fmt: skip
        self.judge = lab.build_judge()
        network = self.student.model.model.diffusion_model
        config = self.student.model.model.model_config.unet_config
        # ComfyUI's map leads from diffusers' names to its own; its one function swaps two halves, so it undoes itself.
        key_map = comfy.utils.flux_to_diffusers(config)
        with torch.inference_mode(False):
            self.transformer = reference.diffusers_flux(
                {key: value.clone() for key, value in network.state_dict().items()}, key_map,
                heads=2, head=32, axes=(8, 12, 12), num_layers=2, num_single_layers=2, joint_attention_dim=lab.CONTEXT,
            )  # fmt: skip
            reference.add_lora(self.transformer, RANK)
            give_lora_a_value(self.student.lora)
            self._copy_lora()
        (self.context, extra) = lab.build_conditioning("FLUX schnell")[0]
        self.pooled = extra["pooled_output"]

    def theirs(self, path: str) -> list:
        """PEFT's layers for one of ours."""
        _, block, name = path.split(".", 2)
        return [self.transformer.get_submodule(f"transformer_blocks.{block}.{part}") for part in NAMES[name]]

    def _copy_lora(self) -> None:
        for path, adapter in zip(self.student.lora.paths, self.student.lora.adapters):
            layers = self.theirs(path)
            for layer, rows in zip(layers, adapter.B.chunk(len(layers))):
                layer.lora_A["default"].weight.data.copy_(adapter.A)
                layer.lora_B["default"].weight.data.copy_(rows)

    def our_gradient(self, change=lambda image: image) -> tuple[float, torch.Tensor]:
        """Loss and gradient of our step, with ``change`` made to the picture before the judge sees it."""
        student = self.student

        def loop():
            self.noise = student.noise(7)
            image = student.decode(student.predict(student.roll(self.noise, 0), 0))
            loss, _ = Objective([Question(QUESTION)], LIKELIHOOD)(self.judge.judge, change(image))
            loss.backward()
            return loss.item(), torch.cat([p.grad.flatten() for p in student.lora.parameters()])

        return student.run(loop, beside=[self.judge.patcher])

    def their_gradient(
        self, stretch: bool, weight_in_backward: float = reference.WEIGHT, answer: str = SPOKEN
    ) -> tuple[float, torch.Tensor]:
        """Loss and gradient of the published step, laid out like ours."""
        with torch.inference_mode(False), torch.enable_grad():
            vae = self.student.vae.first_stage_model
            image = reference.picture(
                self.transformer, vae.decode, self.noise.clone(), self.context.clone(), self.pooled.clone()
            )
            shown = reference.stretched(image) if stretch else image
            loss = reference.answer_loss(self.judge.judge.model, self.judge.judge.processor, shown, QUESTION, answer)
            self.transformer.set_adapters("default", weight_in_backward)
            loss.backward()
        gradient = []
        for path in self.student.lora.paths:
            layers = self.theirs(path)
            gradient.append(sum(layer.lora_A["default"].weight.grad for layer in layers).flatten())
            gradient.append(torch.cat([layer.lora_B["default"].weight.grad for layer in layers]).flatten())
        return loss.item(), torch.cat(gradient)


@pytest.mark.parametrize("stretch", [False, True], ids=["as drawn", "stretched"])
def test_same_loss_and_same_gradient(lab, stretch):
    pair = Pair(lab)
    our_loss, ours = pair.our_gradient(reference.stretched if stretch else lambda image: image)
    their_loss, theirs = pair.their_gradient(stretch)
    assert our_loss == pytest.approx(their_loss, rel=1e-4)
    assert cosine_similarity(ours, theirs, dim=0) > 0.999
    assert ours.norm() == pytest.approx(theirs.norm().item(), rel=1e-3)


def test_difference_1_the_judge_sees_the_picture_as_drawn(lab):
    """Their stretch is another picture: another loss, another gradient."""
    pair = Pair(lab)
    our_loss, ours = pair.our_gradient()
    their_loss, theirs = pair.their_gradient(stretch=True)
    assert our_loss != pytest.approx(their_loss, rel=1e-3)
    assert cosine_similarity(ours, theirs, dim=0) < 0.99


def test_difference_2_every_entry_of_the_lora_moves(lab):
    """A bf16 LoRA loses most of its first steps to rounding at the published learning rate."""
    pair = Pair(lab)
    _, gradient = pair.our_gradient()

    def moved(dtype: torch.dtype) -> float:
        with torch.inference_mode(False):
            start = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0)) / 16  # rank 16, gaussian
            lora = torch.nn.Parameter(start.to(dtype, copy=True))
            lora.grad = gradient.clone().to(dtype)
            torch.optim.AdamW([lora], lr=5e-5, weight_decay=0.0).step()
            return (lora != start.to(dtype))[gradient != 0].float().mean().item()

    assert moved(torch.bfloat16) < 0.5
    assert moved(torch.float32) > 0.99


def test_difference_3_the_scale_is_kept_through_backward(lab):
    """Their reset of the weight is harmless without checkpointing and halves the network's LoRA with it."""
    pair = Pair(lab)
    _, ours = pair.our_gradient()
    _, plain = pair.their_gradient(stretch=False, weight_in_backward=1.0)
    assert cosine_similarity(ours, plain, dim=0) > 0.999
    pair.transformer.zero_grad()
    pair.transformer.set_adapters("default", reference.WEIGHT)
    pair.transformer.train()
    pair.transformer.enable_gradient_checkpointing()
    _, recomputed = pair.their_gradient(stretch=False, weight_in_backward=1.0)
    assert (recomputed - ours).norm() > 0.1 * ours.norm()


def test_difference_4_the_answer_is_spelled_as_the_judge_would(lab):
    """Without its space the answer is another token, with another loss and another gradient."""
    pair = Pair(lab)
    our_loss, ours = pair.our_gradient()
    their_loss, theirs = pair.their_gradient(stretch=False, answer="Yes")
    assert our_loss != pytest.approx(their_loss, rel=1e-3)
    assert cosine_similarity(ours, theirs, dim=0) < 0.99
