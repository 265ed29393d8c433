"""Several prompts in one CONDITIONING."""

from __future__ import annotations

from torch import Tensor


def single_prompts(conditioning: list) -> list[list]:
    """One CONDITIONING for each row of a batched one.

    Args:
        conditioning: ComfyUI's list of [tokens [N, T, C], values]. Entries of one row belong to every prompt; tensors
            among the values that have N rows go with their row.
    Raises:
        ValueError: entries with other numbers of rows than one and N.
    """
    counts = {len(tokens) for tokens, _ in conditioning}
    prompts = max(counts)
    if counts - {1, prompts}:
        raise ValueError(
            f"The parts of positive hold {', '.join(map(str, sorted(counts)))} prompts; which belong together cannot "
            "be told. Give each part as many, or connect the prompts one by one with More Prompts."
        )
    return [[_row(entry, row, prompts) for entry in conditioning] for row in range(prompts)]


def _row(entry: list, row: int, prompts: int) -> list:
    def of_row(value):
        return value[row : row + 1] if isinstance(value, Tensor) and value.ndim and len(value) == prompts else value

    tokens, values = entry
    return [of_row(tokens), {name: of_row(value) for name, value in values.items()}]
