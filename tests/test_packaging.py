"""The pack as a package: what it declares, and what it costs to import."""

import json
import re
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = sorted((ROOT / "example_workflows").glob("*.json"))


def test_requirements_and_pyproject_ask_for_the_same():
    declared = re.search(r"^dependencies = (\[.*?^\])", (ROOT / "pyproject.toml").read_text(), re.S | re.M).group(1)
    listed = (ROOT / "requirements.txt").read_text().split()
    assert json.loads(declared.replace(",\n]", "]")) == listed
    assert not any("==" in line for line in listed), "a pin would fight the user's ComfyUI"


def test_importing_the_package_needs_neither_comfyui_nor_anything_heavy():
    code = "import sys, dual_process; sys.exit(', '.join({'torch', 'transformers', 'comfy'} & set(sys.modules)) or 0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert result.returncode == 0, f"imported by the package: {result.stderr}"


def test_what_the_registry_gets_is_all_that_the_nodes_need(comfyui, tmp_path):
    def tracked(*options):
        found = subprocess.run(
            ["git", "ls-files", "-c", *options], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return set(found.stdout.splitlines())

    left_out = tracked("-i", "-X", ".comfyignore")
    assert {"dev.py", "tiny/scenes.py", "tests/conftest.py"} <= left_out
    for name in tracked() - left_out:
        (tmp_path / "published" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "published" / name)
    code = """
import asyncio, sys
from pathlib import Path
from dual_process.demo.comfyui import use_comfyui
use_comfyui(Path("base"))
import utils.extra_config
sys.path.insert(0, ".")
from published import comfy_entrypoint
nodes = asyncio.run(asyncio.run(comfy_entrypoint()).get_node_list())
nodes = {node.GET_SCHEMA().node_id: node for node in nodes}
nodes["DualProcessTinyTextEncoder"].execute()
judge = nodes["DualProcessJudgeLoader"].define_schema().inputs[0].options[0]
nodes["DualProcessJudgeLoader"].execute(judge, "auto", "auto", "none")
print(sorted(name for name in sys.modules if name.startswith("dual_process")))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "dual_process.nodes" not in result.stdout and "dual_process.tiny" not in result.stdout


def test_every_template_has_a_thumbnail_and_every_thumbnail_a_template():
    assert TEMPLATES
    thumbnails = sorted((ROOT / "example_workflows").glob("*.jpg"))
    assert [path.with_suffix(".jpg") for path in TEMPLATES] == thumbnails


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_templates_links_lead_from_an_output_to_an_input(path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert len(nodes) == len(workflow["nodes"]) and max(nodes) == workflow["last_node_id"]
    links = {link[0]: link for link in workflow["links"]}
    assert len(links) == len(workflow["links"]) and max(links) == workflow["last_link_id"]
    for number, source, source_slot, target, target_slot, kind in workflow["links"]:
        output, entry = nodes[source]["outputs"][source_slot], nodes[target]["inputs"][target_slot]
        assert number in output["links"] and number == entry["link"]
        assert kind == output["type"] == entry["type"]
    used = [number for node in workflow["nodes"] for entry in node["outputs"] for number in entry["links"] or []]
    used += [entry["link"] for node in workflow["nodes"] for entry in node["inputs"] if entry["link"] is not None]
    assert sorted(used) == sorted([*links, *links])


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_templates_nodes_lie_apart_and_in_a_group(path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    boxes = {node["id"]: box(node["pos"][0], node["pos"][1] - 30, *node["size"]) for node in workflow["nodes"]}
    for (a, one), (b, other) in combinations(boxes.items(), 2):
        apart = one[2] <= other[0] or other[2] <= one[0] or one[3] + 30 <= other[1] or other[3] + 30 <= one[1]
        assert apart, f"nodes {a} and {b} overlap"
    groups = [box(*group["bounding"]) for group in workflow["groups"]]
    for number, (left, top, right, bottom) in boxes.items():
        inside = [g for g in groups if g[0] <= left and g[1] + 30 <= top and right <= g[2] and bottom + 30 <= g[3]]
        assert len(inside) == 1, f"node {number}"


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_templates_say_where_their_models_come_from(path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    for node in workflow["nodes"]:
        if node["type"] != "CheckpointLoaderSimple" or node["widgets_values"] == ["dual_process_tiny.safetensors"]:
            continue
        (model,) = node["properties"]["models"]
        assert [model["name"]] == node["widgets_values"] and model["directory"] == "checkpoints"
        assert model["url"].startswith("https://huggingface.co/") and model["url"].endswith("/" + model["name"])
        (note,) = [other["widgets_values"][0] for other in workflow["nodes"] if other["type"] == "MarkdownNote"]
        (judge,) = [o["widgets_values"][0] for o in workflow["nodes"] if o["type"] == "DualProcessJudgeLoader"]
        assert f"--local-dir models/VLM/{judge}\n" in note and "**Not measured:**" in note


REAL = [path for path in TEMPLATES if path.stem.endswith(")")]
LOADED = {"CheckpointLoaderSimple", "DualProcessTinyTextEncoder", "EmptySD3LatentImage", "EmptyLatentImage"}
WITHOUT_A_TINY_VERSION = {"Teach depth with a guide"}  # whose letters nobody can read in 64 px


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_a_real_template_has_the_nodes_and_links_of_its_tiny_version(path):
    name = path.stem.split(" (")[0]
    if name in WITHOUT_A_TINY_VERSION:
        assert path.with_stem(name) not in TEMPLATES
    else:
        assert wiring(path) == wiring(path.with_stem(name))


def wiring(path):
    """Sorted (source, type, target, name of its input) of all links, as if no node enlarged a picture."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in workflow["nodes"]}
    through = {n: node["inputs"][0]["link"] for n, node in nodes.items() if node["type"] == "ImageScaleBy"}
    links = {link[0]: link for link in workflow["links"]}
    found = []
    for _, source, slot, target, target_slot, kind in workflow["links"]:
        if source in through:
            _, source, slot, *_ = links[through[source]]
        if target not in through:
            found.append(
                (called(nodes[source]), kind, called(nodes[target]), nodes[target]["inputs"][target_slot]["name"])
            )
    return sorted(found)


def called(node):
    """A node's type, that of what is loaded left out, and title, without the number of pictures that it may tell."""
    if node["type"] in LOADED:
        return "", ""
    return node["type"], re.sub(r"\d+", "", node.get("title", ""))


def box(left, top, width, height):
    """Left, top, right and bottom."""
    return left, top, left + width, top + height


def test_no_pickle_among_the_bundled_files():
    risky = {".pt", ".pth", ".bin", ".ckpt", ".pkl"}
    assert [path for path in (ROOT / "tiny").rglob("*") if path.suffix in risky] == []


def test_a_thumbnail_shows_the_first_pairs_that_were_taught_or_simply_the_first():
    import torch
    from torchvision.transforms.functional import to_pil_image

    from dual_process.demo.thumbnails import pairs
    from dual_process.tiny import scenes

    low, high = (to_pil_image(scenes.render(torch.full((1, 8), 0.25) + torch.eye(8)[:1] * up)[0]) for up in (0.0, 0.5))
    before, after = [high, low, low], [high, low, high]

    def shown(wanted):
        """Whether the places of the first, the second and the third pair are filled."""
        sheet = pairs(before, after, wanted).convert("L")
        return [sheet.getpixel((x, 60)) > 60 for x in (60, 300)] + [sheet.getpixel((60, 170)) > 60]

    assert shown({"horizon": "Yes"}) == [True, False, False]
    assert shown({}) == [True, True, True]
