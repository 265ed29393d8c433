"""LoRA files: safetensors that any ComfyUI LoRA loader reads, with the story of how they came to be."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

VERSION = "0.1.0"
LONGEST_NAME = 200  # bytes; file systems take 255, of which the number and the ending need some


class TrainedLoRA(dict[str, Tensor]):
    """Core's LORA_MODEL (tensors by file key) that remembers its ``metadata`` (text by text, safetensors header), and
    its layers' ``diffusers_names`` (see ``diffusers_lora``)."""

    def __init__(self, tensors: dict[str, Tensor], metadata: dict[str, str], diffusers_names: dict | None = None):
        super().__init__(tensors)
        self.metadata = metadata
        self.diffusers_names = diffusers_names or {}


def file_start(root: Path, prefix: str) -> Path:
    """``<root>/<prefix>``: the folder and the beginning of the name of files to come.

    Raises:
        ValueError: ``prefix`` is empty, leads out of ``root``, is no name that can be written, or leads through a file.
    """
    if "\0" in prefix or root.resolve() not in (start := (root / prefix).resolve()).parents:
        raise ValueError(f"'{prefix}' is not a file name inside {root}. Use something like 'dual_process/horizon'.")
    for name in start.relative_to(root.resolve()).parts:
        if len(name.encode()) > LONGEST_NAME:
            raise ValueError(f"The name '{name[:20]}…' is longer than {LONGEST_NAME} bytes. Choose a shorter one.")
    for folder in start.parents:
        if folder.is_file():
            raise ValueError(f"{folder} is a file, so nothing can be written into it. Choose another name.")
    return start


def new_lora_path(root: Path, prefix: str) -> Path:
    """``<root>/<prefix>_00001.safetensors``, or one number more than the highest there.

    No file is written over and no gap is filled: only the number of a deleted newest file is given again.

    Raises:
        ValueError: as ``file_start``.
    """
    start = file_start(root, prefix)
    pattern = re.compile(re.escape(start.name) + r"_(\d+)\.safetensors")
    taken = [int(m[1]) for f in start.parent.glob("*.safetensors") if (m := pattern.fullmatch(f.name))]
    return start.with_name(f"{start.name}_{max(taken, default=0) + 1:05}.safetensors")


def save_lora(lora: dict[str, Tensor], path: Path) -> None:
    """Write ``lora`` (a ``TrainedLoRA`` with its metadata, or any dict of tensors) to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in lora.items()}
    header = {"format": "pt", **getattr(lora, "metadata", {}), "ss_output_name": path.stem}
    save_file(tensors, path, metadata=header)
