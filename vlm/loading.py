"""Opening a judge from a folder: checks first, then transformers, never code from the folder."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import torch

from .judge import Judge

_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
_PROCESSOR = ("processor_config.json", "preprocessor_config.json")
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
ATTENTIONS = ("auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3")
_CONFIGS = ("config.json", *_PROCESSOR, "tokenizer_config.json")


class JudgeFolderError(ValueError):
    """A model folder that is refused; the message names the file and the reason."""


def discover_judges(roots: list[Path]) -> dict[str, Path]:
    """Folders that look like image-text-to-text models, one or two levels below the roots.

    Only ``config.json`` is read; whether the model can really be used is decided when it is loaded.

    Returns:
        Name (path below its root, with forward slashes) to folder; the first root wins a name.
    """
    return _found(roots, "config.json", _sees)


def discover_adapters(roots: list[Path]) -> dict[str, Path]:
    """Folders with a PEFT LoRA, one or two levels below the roots; returned as by ``discover_judges``."""
    return _found(roots, _ADAPTER[0])


def _found(roots: list[Path], file: str, wanted: Callable[[Path], bool] = Path.is_file) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for root in roots:
        for path in sorted((*root.glob(f"*/{file}"), *root.glob(f"*/*/{file}"))):
            if wanted(path):
                found.setdefault(path.parent.relative_to(root).as_posix(), path.parent)
    return found


def check_folder(folder: Path, root: Path | None = None) -> None:
    """Refuse a model folder that is incomplete, truncated or would run code, before anything of it is loaded.

    Args:
        folder: the model's folder.
        root: the models folder that nothing may link out of; the model's own folder when None.

    Raises:
        JudgeFolderError: with the file and the reason.
    """
    if not (folder / "config.json").is_file():
        raise JudgeFolderError(f"{folder} is not a model folder: it has no config.json.")
    _check_links(folder, root or folder)
    config = _read(folder / "config.json")
    if not any((folder / name).is_file() for name in _PROCESSOR):
        raise JudgeFolderError(f"{folder} has no {_PROCESSOR[1]}: download the model's processor files too.")
    if not any((folder / name).is_file() for name in _TOKENIZER):
        raise JudgeFolderError(f"{folder} has no tokenizer.json: download the model's tokenizer files too.")
    if (folder / _ADAPTER[0]).is_file():
        raise JudgeFolderError(f"{folder} has an {_ADAPTER[0]}: keep a LoRA adapter in a folder of its own.")
    _check_remote_code(folder, config)
    _check_kernels(folder / "config.json", config)
    for weights in _weights(folder):
        _check_safetensors(weights)


def load_judge(
    folder: Path,
    dtype: torch.dtype | None = None,
    attention: str = "auto",
    root: Path | None = None,
    system: str = "",
    suffix: str = "",
    template: str = "",
    adapter: Path | None = None,
    adapter_root: Path | None = None,
    bits: int | None = None,
    name: str = "",
) -> Judge:
    """Load the model in ``folder`` as a judge, frozen, on the CPU (quantised: on the compute device).

    Args:
        folder: a local Hugging Face model folder with safetensors weights, processor and tokenizer.
        dtype: of the weights; as stored when None. With ``bits`` 4, what is computed in; bfloat16 when None.
        attention: one of ``ATTENTIONS``; "auto" is the model's best without further packages.
        root: the models folder that nothing in ``folder`` may link out of.
        system, suffix, template: see ``Judge``.
        adapter: folder of a PEFT LoRA for the judge, merged into its weights.
        adapter_root: the folder that nothing in ``adapter`` may link out of.
        bits: 8 or 4 quantises through bitsandbytes; such a model cannot be moved afterwards.
        name: how people know it; the folder's own when empty.

    Raises:
        JudgeFolderError: a folder is refused or transformers cannot load it.
        ImportError: bitsandbytes, peft or flash-attn is needed and not installed.
        ValueError: the model cannot be used as a judge.
    """
    from transformers import AutoModelForImageTextToText

    check_folder(folder, root)
    if adapter is not None:
        check_adapter(adapter, adapter_root)
    if attention.startswith("flash"):
        _check_flash(attention)
    local = {"local_files_only": True, "trust_remote_code": False}
    options = {"dtype": dtype or "auto", "use_safetensors": True, **local}
    if attention != "auto":
        options["attn_implementation"] = attention
    if bits is not None:
        options["quantization_config"] = _quantisation(bits, dtype)
    try:
        with torch.inference_mode(False):
            model = AutoModelForImageTextToText.from_pretrained(folder, **options)
            if adapter is not None:
                model = _merged(model, adapter)
            processor = _load_processor(folder, local)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise JudgeFolderError(f"transformers cannot load {folder}: {str(error).splitlines()[0]}") from error
    return Judge(model, processor, name or folder.name, system, suffix, template)


def check_adapter(folder: Path, root: Path | None = None) -> None:
    """Refuse a LoRA folder that is incomplete, truncated or a pickle; raises ``JudgeFolderError``."""
    config, weights = (folder / name for name in _ADAPTER)
    if not config.is_file():
        raise JudgeFolderError(f"{folder} is not a LoRA folder: it has no {config.name}.")
    _check_links(folder, root or folder)
    _read(config)
    if not weights.is_file():
        raise JudgeFolderError(
            f"{folder} has no {weights.name}: save the LoRA as safetensors; pickles are never opened."
        )
    _check_safetensors(weights)


def _merged(model, adapter: Path):
    if importlib.util.find_spec("peft") is None:
        raise ImportError(f"The LoRA {adapter} needs the package peft: pip install peft.")
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(adapter), local_files_only=True).merge_and_unload()


def _check_flash(attention: str) -> None:
    """Without its package transformers would fetch a replacement from the Hub, code that nobody asked for."""
    package = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}[attention]
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"{attention} needs the package {package}, which is not installed: choose sdpa.")


def _quantisation(bits: int, dtype: torch.dtype | None):
    if bits not in (4, 8):
        raise ValueError(f"The judge can be quantised to 8 or 4 bits, not to {bits}.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(f"A judge in {bits} bits needs the package bitsandbytes: pip install bitsandbytes.")
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    # left to itself it computes in float32
    compute = dtype or torch.bfloat16
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def _load_processor(folder: Path, local: dict):
    """The folder's processor with the image processor that works on tensors."""
    import transformers
    from transformers import AutoImageProcessor, AutoProcessor

    if int(transformers.__version__.split(".")[0]) >= 5:
        return AutoProcessor.from_pretrained(folder, **local)
    processor = AutoProcessor.from_pretrained(folder, use_fast=True, **local)
    # Some processors of transformers 4 (the Idefics ones) name their PIL class and ignore use_fast.
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, use_fast=True, **local)
    return processor


def _sees(config: Path) -> bool:
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(content, dict):
        return False
    return any(key in content for key in ("vision_config", "image_token_id", "image_token_index"))


def _read(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise JudgeFolderError(f"{path} is not readable JSON ({error}): download the file again.") from error
    if not isinstance(content, dict):
        raise JudgeFolderError(f"{path} holds no JSON object: download the file again.")
    return content


def _check_links(folder: Path, root: Path) -> None:
    """Nothing in the folder may lead out of ``root``."""
    allowed = root.resolve()
    for path in (folder, *folder.rglob("*")):
        if not path.resolve().is_relative_to(allowed):
            raise JudgeFolderError(f"{path} links to {path.resolve()}, outside {allowed}: copy the file there instead.")


def _check_remote_code(folder: Path, config: dict) -> None:
    """``auto_map`` names Python files; it is harmless only where transformers has the class itself."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if config.get("model_type") in CONFIG_MAPPING_NAMES:
        return
    for name in _CONFIGS:
        if (folder / name).is_file() and "auto_map" in _read(folder / name):
            raise JudgeFolderError(
                f"{folder / name} asks for code from the model folder (auto_map), which is never run: "
                f'choose a model whose type transformers knows; it does not know "{config.get("model_type")}".'
            )


def _check_kernels(path: Path, config: dict) -> None:
    """A config may name a repository of the Hub whose compiled code computes its attention or its experts."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_kernels(path, value)
        elif key.removesuffix("_internal").endswith("_implementation") and "/" in str(value):
            raise JudgeFolderError(f'{path} asks for code from "{value}" ({key}), never run: delete that entry.')


def _weights(folder: Path) -> list[Path]:
    """The safetensors files that transformers will read."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_read(index).get("weight_map", {}).values()))
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise JudgeFolderError(f'{index} names "{name}", which is not a safetensors file of this folder.')
            if not (folder / name).is_file():
                raise JudgeFolderError(f"{folder / name} is missing: download it; the weights are {len(names)} files.")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise JudgeFolderError(
            f"{folder / pickles[0]} is a pickle, which can run code and is never opened: convert it to safetensors."
        )
    raise JudgeFolderError(f"{folder} has no model.safetensors: download the weights.")


def _check_safetensors(path: Path) -> None:
    """The header's own byte count must be the file's size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise JudgeFolderError(f"{path} is truncated at {size} bytes: download it again.")
        try:
            header = json.loads(file.read(length))
            end = max((spec["data_offsets"][1] for name, spec in header.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise JudgeFolderError(f"{path} has no safetensors header: download it again.") from error
    if size != 8 + length + end:
        raise JudgeFolderError(f"{path} has {size} bytes where its header needs {8 + length + end}: download it again.")
