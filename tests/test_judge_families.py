"""Every family of vision language models through the checks that the README's table reports."""

from __future__ import annotations

import pytest
import transformers

from dual_process.benchmarks.matrix_judges import examine
from dual_process.tests.vlm_families import FAMILIES


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name, tmp_path):
    if name == "SmolVLM":
        pytest.importorskip("num2words", reason="transformers' SmolVLM processor needs num2words")
    row = examine(name, tmp_path / "model")
    if name == "Mllama" and transformers.__version__.startswith("4."):
        assert "cuts the gradient" in row["why"]
    else:
        assert row["ok"], row
        assert row["one_look"] == (name != "PaliGemma")
