"""A word-level text encoder for the bundled student, as a real `comfy.sd.CLIP`.

The student's prompts use a few dozen words whose meaning does not depend on their order, so a table of word vectors is
all it takes: one column block is the context, the other is summed into the pooled output.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

if TYPE_CHECKING:
    import comfy.sd

TEXT_ENCODER = Path(__file__).parent / "prompt_encoder" / "dual_process_tiny_text_encoder.safetensors"
WORDS = ("a", "landscape", "with", "two", "balls", "the", "ball", "in", "front", "lines", "horizon",
         "warm", "cool", "high", "low", "thick", "thin", "white", "green")
CONTEXT_WIDTH = POOLED_WIDTH = 64
LENGTH = 16  # tokens in one chunk of a prompt; token 0 is padding, its vectors are zero


def words_to_tokens(text: str) -> list[int]:
    """Token numbers of the known words of ``text``; everything else is ignored."""
    return [WORDS.index(word) + 1 for word in re.findall(r"[a-z]+", text.lower()) if word in WORDS]


def pad(tokens: list[Any], padding: Any) -> list[list[Any]]:
    """Cut into chunks of `LENGTH`, at least one, the last filled with ``padding``."""
    chunks = [tokens[i:i + LENGTH] for i in range(0, len(tokens), LENGTH)] or [[]]
    chunks[-1] = chunks[-1] + [padding] * (LENGTH - len(chunks[-1]))
    return chunks


class TinyTokenizer:
    """What `comfy.sd.CLIP` expects of a tokenizer; understands the (word:1.2) weights of prompts."""

    def __init__(self, embedding_directory: str | None = None, tokenizer_data: dict[str, Any] | None = None) -> None:
        pass

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_: Any) -> dict[str, list]:
        from comfy.sd1_clip import escape_important, token_weights, unescape_important

        parts = token_weights(escape_important(text), 1.0)
        tokens = [(token, weight) for part, weight in parts for token in words_to_tokens(unescape_important(part))]
        if return_word_ids:
            tokens = [(token, weight, i + 1) for i, (token, weight) in enumerate(tokens)]
        return {"tiny": pad(tokens, (0, 1.0, 0) if return_word_ids else (0, 1.0))}

    def untokenize(self, pairs: list[tuple]) -> list[tuple]:
        return [(pair, (("",) + WORDS)[pair[0]]) for pair in pairs]

    def state_dict(self) -> dict[str, Tensor]:
        return {}


class TinyTextEncoder(nn.Module):
    """Word vectors [tokens, 64 + 64]: context, then pooled."""

    def __init__(self, device: Any = "cpu", dtype: torch.dtype = torch.float32,
                 model_options: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.dtypes = {dtype}
        self.words = nn.Embedding(len(WORDS) + 1, CONTEXT_WIDTH + POOLED_WIDTH, 0, device=device, dtype=dtype)

    def forward(self, tokens: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens [B, T] to context [B, T, 64] and pooled [B, 64]; a weight of 0 removes a word."""
        vectors = self.words(tokens).float()
        if weights is not None:
            vectors = vectors * weights[..., None]
        return vectors[..., :CONTEXT_WIDTH], vectors[..., CONTEXT_WIDTH:].sum(1)

    def encode_token_weights(self, tokens: dict[str, list]) -> tuple[Tensor, Tensor]:
        from comfy.model_management import intermediate_device

        flat = [pair for chunk in tokens["tiny"] for pair in chunk]
        device = self.words.weight.device
        numbers = torch.tensor([[pair[0] for pair in flat]], device=device)
        weights = torch.tensor([[pair[1] for pair in flat]], dtype=torch.float32, device=device)
        context, pooled = self(numbers, weights)
        return context.to(intermediate_device()), pooled.to(intermediate_device())

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """CLIP layers and projections: this encoder has none."""

    def reset_clip_options(self) -> None:
        """See `set_clip_options`."""

    def load_sd(self, weights: dict[str, Tensor]) -> Any:
        return self.load_state_dict(weights)


class _Target:
    params: dict[str, Any] = {}
    clip = TinyTextEncoder
    tokenizer = TinyTokenizer


def load_tiny_clip() -> comfy.sd.CLIP:
    """Build a `comfy.sd.CLIP` from the bundled `TEXT_ENCODER`; works with the stock text nodes."""
    import comfy.sd

    weights = load_file(TEXT_ENCODER)
    clip = comfy.sd.CLIP(_Target, parameters=sum(w.numel() for w in weights.values()))
    clip.load_sd(weights)
    clip.cond_stage_model.requires_grad_(False)
    return clip
