"""LoRA layers and files, without ComfyUI."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

from dual_process.trainers.lora import LoRA, lora_targets, repeated_blocks
from dual_process.trainers.lora_file import TrainedLoRA, new_lora_path, save_lora


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8)})
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(8, 48))
        self.img_mod = nn.Linear(8, 8)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.x_embedder = nn.Linear(8, 8)
        self.time_embed = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.final_layer = nn.Linear(8, 8)


def test_targets_are_attention_and_mlp_of_the_blocks():
    names = ["attn.qkv", "attn.proj", "mlp.0", "mlp.2"]
    assert [path for path, _ in repeated_blocks(Net())] == ["blocks.0", "blocks.1"]
    assert list(lora_targets(Net())) == [f"blocks.{i}.{name}" for i in (0, 1) for name in names]
    assert list(lora_targets(Net(), r"attn\.qkv")) == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    with pytest.raises(ValueError, match="Net matches the LoRA targets 'cross'"):
        lora_targets(Net(), "cross")


@pytest.mark.parametrize(
    ("pattern", "chosen"),
    [
        ("img_mod", ["img_mod"]),
        ("adaLN", ["adaLN_modulation.1"]),
        ("qkv|img_mod", ["attn.qkv", "img_mod"]),
        ("blocks", ["attn.qkv", "attn.proj", "mlp.0", "mlp.2"]),
        (r"blocks\.\d+\.", ["attn.qkv", "attn.proj", "mlp.0", "mlp.2"]),
        (".*", ["attn.qkv", "attn.proj", "mlp.0", "mlp.2", "adaLN_modulation.1", "img_mod"]),
    ],
)
def test_layers_that_steer_are_adapted_only_when_named(pattern, chosen):
    assert list(lora_targets(Net(), pattern)) == [f"blocks.{i}.{name}" for i in (0, 1) for name in chosen]


@pytest.mark.parametrize("name", ["modC", "modCX", "mapper", "mapper_sca", "img_mod", "adaLN_modulation", "norm1"])
def test_what_models_call_layers_that_steer(name):
    """AuraFlow and Stable Cascade among them; Cascade's ``kv_mapper`` draws."""
    net = Net()
    for block in net.blocks:
        block.add_module(name, nn.Linear(8, 8))
        block.kv_mapper = nn.Linear(8, 8)
    assert [path for path in lora_targets(net) if name in path.split(".")] == []
    assert "blocks.0.kv_mapper" in lora_targets(net)


@pytest.mark.parametrize("pattern", ["*attn", "attn["])
def test_targets_that_are_no_pattern_are_said_to_be_none(pattern):
    with pytest.raises(ValueError, match="are not a valid regular expression.*Write 'attn', for example"):
        lora_targets(nn.Module(), pattern)


def test_injected_is_the_formula_and_ejected_is_as_before():
    torch.manual_seed(0)
    net = Net()
    lora = LoRA(lora_targets(net), rank=2, alpha=6.0, seed=1)
    layer, adapter = net.blocks[1].mlp[0], lora.adapters[lora.paths.index("blocks.1.mlp.0")]
    x = torch.randn(3, 8)
    before = layer(x)
    lora.inject(net)
    assert torch.equal(layer(x), before)  # B is zero at the start
    nn.init.normal_(adapter.B)
    assert torch.allclose(layer(x), before + 3.0 * x @ adapter.A.T @ adapter.B.T, atol=1e-6)
    with lora.disabled():
        assert torch.equal(layer(x), before)
    tensors = lora.export()
    a, b = (tensors[f"diffusion_model.blocks.1.mlp.0.lora_{n}.weight"] for n in "AB")
    assert torch.allclose(layer(x), before + x @ a.T @ b.T, atol=1e-6)
    lora.eject()
    assert torch.equal(layer(x), before)
    assert not any("forward" in vars(module) for module in net.modules())


def test_a_half_precision_model_gets_a_float32_lora():
    net = Net().bfloat16()
    lora = LoRA(lora_targets(net), rank=2, alpha=2.0, seed=0)
    lora.inject(net)
    assert all(p.dtype == torch.float32 for p in lora.parameters())
    assert net.blocks[0].mlp[0](torch.randn(3, 8).bfloat16()).dtype == torch.bfloat16


def test_activations_are_kept_in_their_own_dtype_and_may_be_written_into():
    """By query, key and value in bfloat16; gradients are nearly those of the product in float32."""
    layers = nn.ModuleDict({name: nn.Linear(16, 16).bfloat16().requires_grad_(False) for name in "qkv"})
    lora = LoRA(dict(layers.items()), rank=2, alpha=6.0, seed=0)
    for adapter in lora.adapters:
        nn.init.normal_(adapter.B)
    start = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    x, kept = start.clone(), []
    lora.inject(layers)
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
        updated = torch.stack([layer(x) for layer in layers.values()])
    lora.eject()
    x += 1
    assert [saved.dtype for saved in kept if saved.numel() == x.numel()] == 3 * [torch.bfloat16]

    updates = [(3.0 * start.float() @ adapter.A.T @ adapter.B.T).bfloat16() for adapter in lora.adapters]
    formula = torch.stack([layer(start) + update for layer, update in zip(layers.values(), updates)])
    weights = torch.randn(formula.shape, generator=torch.Generator().manual_seed(1))
    learned = [start, *lora.parameters()]
    for found, exact in zip(*(torch.autograd.grad((y * weights).sum(), learned) for y in (updated, formula))):
        assert (found - exact).norm() < 0.01 * exact.norm()


def test_the_seed_decides_the_start():
    def start(seed):
        return LoRA(lora_targets(Net()), 2, 2.0, seed).adapters[0].A

    assert torch.equal(start(1), start(1)) and not torch.equal(start(1), start(2))


def test_every_file_gets_a_new_name(tmp_path):
    lora = TrainedLoRA({"diffusion_model.x.lora_A.weight": torch.ones(2, 3)}, {"dual_process": json.dumps({"a": 1})})
    first = new_lora_path(tmp_path, "mine/horizon")
    save_lora(lora, first)
    second = new_lora_path(tmp_path, "mine/horizon")
    assert (first.name, second.name) == ("horizon_00001.safetensors", "horizon_00002.safetensors")
    with safe_open(first, "pt") as file:
        assert json.loads(file.metadata()["dual_process"]) == {"a": 1}
        assert torch.equal(file.get_tensor("diffusion_model.x.lora_A.weight"), torch.ones(2, 3))


@pytest.mark.parametrize("prefix", ["", "../outside", "/outside", "a/../../outside", "folder/..", "a\0b"])
def test_no_file_outside_the_loras_folder(tmp_path, prefix):
    with pytest.raises(ValueError, match="is not a file name inside"):
        new_lora_path(tmp_path / "loras", prefix)


def test_a_name_longer_than_files_can_have(tmp_path):
    with pytest.raises(ValueError, match="longer than 200 bytes"):
        new_lora_path(tmp_path, "dual_process/" + "ä" * 101)
    with pytest.raises(ValueError, match="longer than 200 bytes"):
        new_lora_path(tmp_path, "ä" * 101 + "/horizon")
    save_lora({"x": torch.ones(1)}, new_lora_path(tmp_path, "ä" * 100))
    (tmp_path / "mine").touch()
    with pytest.raises(ValueError, match="mine is a file"):
        new_lora_path(tmp_path, "mine/horizon")
