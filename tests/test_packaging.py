"""The pack as a package: what it declares, and what it costs to import."""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_requirements_and_pyproject_ask_for_the_same():
    declared = re.search(r"^dependencies = (\[.*?^\])", (ROOT / "pyproject.toml").read_text(), re.S | re.M).group(1)
    listed = (ROOT / "requirements.txt").read_text().split()
    assert json.loads(declared.replace(",\n]", "]")) == listed
    assert not any("==" in line for line in listed), "a pin would fight the user's ComfyUI"


def test_importing_the_package_needs_neither_comfyui_nor_anything_heavy():
    code = "import sys, dual_process; sys.exit(', '.join({'torch', 'transformers', 'comfy'} & set(sys.modules)) or 0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert result.returncode == 0, f"imported by the package: {result.stderr}"


def test_every_template_has_a_thumbnail():
    templates = list((ROOT / "example_workflows").glob("*.json"))
    assert templates
    assert [path.name for path in templates if not path.with_suffix(".jpg").is_file()] == []


def test_no_pickle_among_the_bundled_files():
    risky = {".pt", ".pth", ".bin", ".ckpt", ".pkl"}
    assert [path for path in (ROOT / "tiny").rglob("*") if path.suffix in risky] == []
