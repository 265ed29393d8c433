"""Model folders that are refused, and what a good one becomes."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch

from dual_process.benchmarks.matrix_judges import gradient, together
from dual_process.tests import vlm_families
from dual_process.vlm.loading import (
    JudgeFolderError,
    check_folder,
    discover_adapters,
    discover_judges,
    load_judge,
)
from dual_process.vlm.question import Question


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    model, processor = vlm_families.build("Idefics3")
    folder = tmp_path_factory.mktemp("good") / "tiny"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "VLM" / "tiny")


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refuse(folder, *words, root=None):
    """Loading is refused with one sentence that names the file."""
    with pytest.raises(JudgeFolderError) as refusal:
        load_judge(folder, root=root)
    for word in words:
        assert word in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_good_folder_loads_frozen(folder):
    check_folder(folder)
    judge = load_judge(folder, dtype=torch.float64)
    assert judge.name == "tiny" and judge.model.dtype == torch.float64
    assert not judge.model.training and not any(p.requires_grad for p in judge.model.parameters())


def test_loading_inside_inference_mode_leaves_a_judge_that_backpropagates(folder):
    with torch.inference_mode():
        judge = load_judge(folder)
    image = torch.rand(1, 3, 64, 64, requires_grad=True)
    judge.log_likelihood(image, [Question("Warm?")]).sum().backward()
    assert image.grad.abs().max() > 0


def test_truncated_safetensors(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refuse(folder, "model.safetensors", "download it again")


def test_safetensors_with_a_broken_header(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(b"\x10" + b"\0" * 7 + b"not json at all!" + b"\0" * 64)
    refuse(folder, "model.safetensors", "no safetensors header")


def test_empty_weights(folder):
    (folder / "model.safetensors").write_bytes(b"")
    refuse(folder, "model.safetensors", "truncated at 0 bytes")


def test_a_missing_shard(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(folder, "model-00001-of-00002.safetensors", "missing")


@pytest.mark.parametrize("shard", ["../../other/model.safetensors", "pytorch_model.bin"])
def test_an_index_that_names_other_files(folder, shard):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    refuse(folder, "model.safetensors.index.json", shard)


class Bomb:
    """Runs code when unpickled."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was opened')",))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "model.ckpt"])
def test_pickles_are_never_opened(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    refuse(folder, name, "pickle")


def test_a_pickle_beside_safetensors_is_ignored(folder):
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    (folder / "training_args.bin").write_bytes(pickle.dumps(Bomb()))
    load_judge(folder)


@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "tokenizer.json"])
def test_missing_files(folder, name):
    (folder / name).unlink()
    (folder / "preprocessor_config.json").unlink(missing_ok=True)
    refuse(folder, "config.json" if name == "config.json" else name.split("_")[0].split(".")[0])


def test_a_config_that_is_no_json(folder):
    (folder / "config.json").write_text("{'model_type': ")
    refuse(folder, "config.json", "JSON")


def test_remote_code_is_refused_and_not_run(folder):
    (folder / "evil.py").write_text("raise SystemExit('code of the model folder was run')")
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"}
    edit(folder / "config.json", model_type="evil", auto_map=auto_map)
    refuse(folder, "config.json", "auto_map", '"evil"')


def test_remote_code_for_a_known_class_is_ignored(folder):
    (folder / "evil.py").write_text("raise SystemExit('code of the model folder was run')")
    edit(folder / "config.json", auto_map={"AutoModelForImageTextToText": "evil.Model"})
    load_judge(folder)


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "_experts_implementation_internal"])
@pytest.mark.parametrize("part", ["top", "text"])
def test_kernels_from_the_hub_are_refused(folder, key, part):
    named = {key: "someone/kernels"}
    edit(folder / "config.json", **(named if part == "top" else {"text_config": named}))
    refuse(folder, "config.json", "someone/kernels", key)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_without_its_package_is_one_sentence(folder, attention, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=f"{attention} needs the package flash_attn"):
        load_judge(folder, attention=attention)


def test_attention_is_as_chosen(folder):
    chosen = {name: load_judge(folder, attention=name) for name in ("auto", "sdpa", "eager")}
    used = {name: judge.model.config.text_config._attn_implementation for name, judge in chosen.items()}
    assert used == {"auto": "sdpa", "sdpa": "sdpa", "eager": "eager"}
    image = torch.rand(1, 3, 64, 64)
    scores = torch.cat([judge.log_likelihood(image, [Question("Warm?")]) for judge in chosen.values()])
    assert (scores - scores[0]).abs().max() < 1e-4


def test_a_model_that_is_no_vlm(folder):
    edit(folder / "config.json", model_type="bert", architectures=["BertModel"])
    refuse(folder, "transformers cannot load")


def test_links_out_of_the_models_folder(folder, tmp_path):
    outside = tmp_path / "outside.safetensors"
    shutil.move(folder / "model.safetensors", outside)
    (folder / "model.safetensors").symlink_to(outside)
    refuse(folder, "model.safetensors", "outside", root=folder.parent)


def test_a_folder_that_is_a_link_out_of_the_models_folder(folder, tmp_path):
    root = tmp_path / "models"
    root.mkdir()
    (root / "linked").symlink_to(folder)
    refuse(root / "linked", "links to", root=root)


def test_links_inside_the_models_folder_are_fine(folder):
    blob = folder.parent / "blobs" / "weights"
    blob.parent.mkdir()
    shutil.move(folder / "model.safetensors", blob)
    (folder / "model.safetensors").symlink_to(blob)
    check_folder(folder, root=folder.parent)


def test_an_adapter_does_not_redirect_to_another_base(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/else"}))
    refuse(folder, "adapter_config.json")


def test_a_lora_on_the_judge_changes_its_answers(folder, tmp_path):
    peft = pytest.importorskip("peft")
    base = load_judge(folder)
    tuned = peft.get_peft_model(load_judge(folder).model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    tuned.save_pretrained(tmp_path / "lora")
    judge = load_judge(folder, adapter=tmp_path / "lora")
    image = torch.rand(1, 3, 64, 64, requires_grad=True)
    asked = [Question("Warm?"), Question("Is the line thick?")]
    scores = judge.log_likelihood(image, asked)
    scores.sum().backward()
    assert (scores - base.log_likelihood(image, asked)).abs().max() > 1e-3
    assert image.grad.abs().max() > 0 and not any(p.requires_grad for p in judge.model.parameters())


def test_a_pickled_lora_is_refused(folder, tmp_path):
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text("{}")
    (lora / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(JudgeFolderError, match="adapter_model.safetensors"):
        load_judge(folder, adapter=lora)


def test_an_8_bit_judge_hands_the_gradient_to_the_pixels(folder):
    pytest.importorskip("bitsandbytes")
    image = torch.rand(1, 3, 64, 64, requires_grad=True)
    asked = [Question("Warm?"), Question("Is the line thick?")]
    gradients = []
    for bits in (None, 8):  # 8 bits round activations too: the score is a staircase, so not by finite differences
        judge = load_judge(folder, dtype=torch.float32, bits=bits)
        gradients.append(torch.autograd.grad(judge.log_likelihood(image, asked).sum(), image)[0].flatten())
        assert judge.look.shares
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98


def test_a_4_bit_judge_hands_the_gradient_to_the_pixels(folder):
    pytest.importorskip("bitsandbytes")
    judge = load_judge(folder, dtype=torch.float32, bits=4)
    assert together(judge) < 0.05 and judge.look.shares
    assert gradient(judge) < 0.01


def test_only_8_and_4_bits(folder):
    with pytest.raises(ValueError, match="8 or 4 bits, not to 3"):
        load_judge(folder, bits=3)


def test_discovery_reads_configs_only(folder):
    shutil.copytree(folder, folder.parent / "owner" / "nested")
    (folder.parent / "text-only").mkdir()
    (folder.parent / "text-only" / "config.json").write_text('{"model_type": "llama"}')
    (folder.parent / "broken").mkdir()
    (folder.parent / "broken" / "config.json").write_text("{")
    (folder.parent / "owner" / "lora").mkdir()
    (folder.parent / "owner" / "lora" / "adapter_config.json").write_text("{}")
    roots = [folder.parent, folder.parent / "missing"]
    assert set(discover_judges(roots)) == {"tiny", "owner/nested"}
    assert set(discover_adapters(roots)) == {"owner/lora"}
