"""The pack in a real ComfyUI server, used over HTTP and the websocket as the front end does."""

import io
import json
import urllib.parse
from copy import deepcopy
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from dual_process.demo.client import PromptFailed, PromptInterrupted, PromptRejected
from dual_process.demo.templates import templates
from dual_process.demo.workflow import nodes_of, template, template_names, to_api, widget_names

NODE_IDS = {
    "DualProcessJudgeLoader",
    "DualProcessQuestion",
    "DualProcessMorePrompts",
    "DualProcessTrainer",
    "DualProcessApplyLoRA",
    "DualProcessSaveLoRA",
    "DualProcessReport",
    "DualProcessStrengthSheet",
    "DualProcessTinyTextEncoder",
    "DualProcessAskJudge",
    "DualProcessJudgeScore",
    "DualProcessSeenByJudge",
    "DualProcessHorizonGuide",
    "DualProcessPaletteGuide",
    "DualProcessLineWeightGuide",
    "DualProcessDepthGuide",
    "DualProcessCompositionGuide",
    "DualProcessGuideFromImage",
    "DualProcessBeforeAfterGuide",
}
JPEG = b"\xff\xd8\xff"  # how its files begin
API_FORM = Path(__file__).parent / "api" / "teach.json"


@pytest.fixture
def object_info(client):
    """What the server knows about our nodes and all others."""
    return client.get_json("/object_info")


@pytest.fixture
def teach(object_info):
    """The template in API form with a training run of three steps; a function of what to change on the trainer."""

    def graph(**trainer_inputs):
        changed = to_api(template("Teach the horizon"), object_info)
        (trainer,) = nodes_of(changed, "DualProcessTrainer")
        changed[trainer]["inputs"] |= {"steps": 3, "check_every": 0} | trainer_inputs
        return changed

    return graph


def loras(client):
    """Names of the LoRAs the server lists."""
    return set(client.get_json("/models/loras"))


def drawing_only(graph, seed):
    """The part of the template that draws without the LoRA."""
    graph = deepcopy(graph)
    (trainer,) = nodes_of(graph, "DualProcessTrainer")
    dependent = {trainer}
    while more := {
        node_id
        for node_id, node in graph.items()
        if node_id not in dependent
        and any(isinstance(value, list) and value[0] in dependent for value in node["inputs"].values())
    }:
        dependent |= more
    kept = {node_id: node for node_id, node in graph.items() if node_id not in dependent}
    kept[nodes_of(kept, "KSampler")[0]]["inputs"]["seed"] = seed
    return kept


def pixels(client, outputs, graph):
    """The bytes of the pictures shown by the graph's first PreviewImage."""
    shown = outputs[nodes_of(graph, "PreviewImage")[0]]["images"]
    return [Image.open(io.BytesIO(client.picture(one))).convert("RGB").tobytes() for one in shown]


def with_tiny_loaders(graph):
    """A template's graph with the bundled models instead of its own."""
    graph["tiny"] = {"class_type": "DualProcessTinyTextEncoder", "inputs": {}}
    for node in graph.values():
        if node["class_type"] == "CheckpointLoaderSimple":
            node["inputs"]["ckpt_name"] = "dual_process_tiny.safetensors"
        elif node["class_type"] == "DualProcessJudgeLoader":
            if "(bundled)" not in node["inputs"]["judge"]:
                node["inputs"]["judge"] = "tiny judge (bundled)"
        elif node["class_type"] == "CLIPTextEncode":
            node["inputs"]["clip"] = ["tiny", 0]
    return graph


def smallest(graph):
    """A template's graph with one step of training, one of sampling and two small pictures."""
    for node in graph.values():
        if node["class_type"] == "DualProcessTrainer":
            node["inputs"] |= {"steps": 1, "sampler_steps": 1, "check_every": 0, "self_check": False}
        elif node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 1
        elif node["class_type"].startswith("Empty"):
            node["inputs"] |= {"width": 64, "height": 64, "batch_size": 2}
    return graph


def test_all_nodes_are_there_and_explain_themselves(object_info):
    ours = {name: info for name, info in object_info.items() if name.startswith("DualProcess")}
    assert set(ours) - {"DualProcessJudgeFromClip"} == NODE_IDS  # that one depends on ComfyUI's core
    for name, info in ours.items():
        assert info["description"] and info["category"].startswith("dual process"), name
        inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        silent = [key for key, value in inputs.items() if not (len(value) > 1 and value[1].get("tooltip"))]
        assert not silent, f"{name}: inputs without a tooltip: {silent}"


def test_load_checkpoint_offers_the_tiny_student_and_not_its_prompt_encoder(client):
    ours = [name for name in client.get_json("/models/checkpoints") if name.startswith("dual_process")]
    assert ours == ["dual_process_tiny.safetensors"]


def explained(page):
    """The names in the first columns of a help page's tables, by what stands over them: input or output."""
    columns = {"input": [], "output": []}
    for cell in [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("|")]:
        if cell in columns:
            column = columns[cell]
        elif cell != "---":
            column += cell.split(", ")
    return columns


def test_every_node_has_a_help_page_that_explains_every_input_and_output(client, object_info):
    for name in [name for name in object_info if name.startswith("DualProcess")]:
        page = client.get(f"/extensions/dual_process/docs/{name}.md").decode()
        inputs = {**object_info[name]["input"].get("required", {}), **object_info[name]["input"].get("optional", {})}
        assert page.startswith("# ")
        columns = explained(page)
        assert sorted(columns["input"]) == sorted(inputs), name
        assert sorted(columns["output"]) == sorted(object_info[name]["output_name"]), name


def test_templates_are_listed_with_their_thumbnails(client):
    assert sorted(client.get_json("/workflow_templates")["dual_process"]) == template_names()
    for name in template_names():
        picture = client.get("/api/workflow_templates/dual_process/" + urllib.parse.quote(f"{name}.jpg"))
        assert Image.open(io.BytesIO(picture)).format == "JPEG"


def test_templates_are_what_dev_py_templates_writes(client, object_info):
    if client.get_json("/system_stats")["system"]["comfyui_version"] != "0.3.75":
        pytest.skip("they are written from the node definitions of the oldest ComfyUI that is supported")
    written = dict(templates(object_info))
    assert sorted(written) == template_names()
    for name, content in written.items():
        assert content == template(name), name


@pytest.mark.parametrize("name", template_names())
def test_template_runs_with_the_tiny_models_and_one_step(client, object_info, name):
    saved = template(name)
    for node in saved["nodes"]:
        if node["type"] in object_info:
            assert len(node["widgets_values"]) == len(widget_names(object_info[node["type"]])), node["type"]
    graph = smallest(with_tiny_loaders(to_api(saved, object_info)))
    outputs = client.run(graph)
    assert all(outputs[node_id]["images"] for node_id in nodes_of(graph, "PreviewImage"))


def test_template_in_api_form_is_what_the_front_end_sends(object_info):
    sent = json.loads(API_FORM.read_text())
    for node in sent.values():
        node.pop("_meta")
    assert to_api(template("Teach the horizon"), object_info) == sent


def test_template_trains_shows_progress_and_saves(client, server, teach):
    graph = teach(seed=11, check_every=1)
    (trainer,) = nodes_of(graph, "DualProcessTrainer")
    known, events = loras(client), []
    outputs = client.run(graph, events.append)
    (new,) = loras(client) - known
    assert (server.base / "models" / "loras" / new).is_file()
    steps = [event["data"] for event in events if event["type"] == "dual_process.progress"]
    assert [(step["step"], step["steps"]) for step in steps] == [(1, 3), (2, 3), (3, 3)]
    assert all(0 <= score <= 1 for step in steps for score in step["scores"])
    (curves,) = outputs[trainer]["curves"]
    assert curves == steps[-1]["curves"] and curves["steps"] == 3, "who opens the page later sees the same"
    for number, (asked, points) in enumerate((one["text"], one["points"]) for one in curves["questions"]):
        assert asked.startswith(("Is the horizon", "Is this a clean picture")[number])
        assert [point[0] for point in points] == [1, 2, 3]
        assert points[-1][1] == pytest.approx(sum(step["scores"][number] for step in steps) / 3)
    assert "Held-out seeds" in outputs[trainer]["text"][0]
    assert any(event["type"] == "progress" and event["data"]["node"] == trainer for event in events)
    frames = [event["data"] for event in events if event["type"] == "binary"]
    sizes = {Image.open(io.BytesIO(one[one.index(JPEG) :])).size for one in frames if JPEG in one}
    assert (512, 256) in sizes, "no live preview of two rows of four: held-out seeds above, what is trained on below"
    assert all(outputs[node_id]["images"] for node_id in nodes_of(graph, "PreviewImage"))
    with safe_open(server.base / "models" / "loras" / new, "pt") as file:
        story = json.loads(file.metadata()["dual_process"])
    assert story["prompt_texts"] == ["a landscape with two balls"]
    assert [len(one["scores"]) for one in story["unseen"]] == [2, 2], "judged once more at the end"


def test_second_queue_is_cached_and_another_seed_gets_a_new_file(client, teach):
    client.run(teach(seed=21))
    known, events = loras(client), []
    client.run(teach(seed=21), events.append)
    trainer = nodes_of(teach(), "DualProcessTrainer")[0]
    cached = [event["data"]["nodes"] for event in events if event["type"] == "execution_cached"]
    assert trainer in cached[0] and loras(client) == known
    client.run(teach(seed=22))
    assert len(loras(client) - known) == 1


def test_another_file_under_the_same_name_is_read_anew(client, server, teach):
    known = loras(client)
    client.run(smallest(teach(seed=23)))
    (name,) = loras(client) - known
    graph = smallest(teach(seed=24, continue_from=name))
    (trainer,), (apply,) = (nodes_of(graph, f"DualProcess{kind}") for kind in ("Trainer", "ApplyLoRA"))
    del graph[apply]["inputs"]["lora"]
    graph[apply]["inputs"]["lora_name"] = name
    drawn = {key: graph[trainer]["inputs"][key] for key in ("model", "vae", "positive", "latent", "cfg", "seed")}
    drawn |= {"sampler_steps": 1, "sampler_name": "euler", "scheduler": "simple"}
    inputs = {**drawn, "lora_name": name, "strengths": "1"}
    graph["sheet"] = {"class_type": "DualProcessStrengthSheet", "inputs": inputs}
    readers = {trainer, apply, "sheet"}

    def cached():
        events = []
        client.run(graph, events.append)
        (nodes,) = [event["data"]["nodes"] for event in events if event["type"] == "execution_cached"]
        return readers.intersection(nodes)

    assert cached() == set() and cached() == readers
    (server.base / "models" / "loras" / name).touch()
    assert cached() == set()


def test_cancel_leaves_the_model_as_it_was(client, teach):
    drawing = drawing_only(teach(), seed=5)
    before = pixels(client, client.run(drawing), drawing)
    known = loras(client)

    def cancel_at_second_step(event):
        if event["type"] == "dual_process.progress" and event["data"]["step"] == 2:
            client.interrupt()

    with pytest.raises(PromptInterrupted):
        client.run(teach(seed=31, steps=10000, check_every=0), cancel_at_second_step)
    assert loras(client) == known
    assert pixels(client, client.run(drawing), drawing) == before
    client.run(teach(seed=31))
    assert len(loras(client) - known) == 1


def test_cancel_saves_the_best_lora_so_far_to_go_on_from(client, teach):
    known = loras(client)

    def cancel_at_sixth_step(event):
        if event["type"] == "dual_process.progress" and event["data"]["step"] == 6:
            client.interrupt()

    with pytest.raises(PromptInterrupted):
        client.run(teach(seed=32, steps=10000, learning_rate=1e-3, check_every=1), cancel_at_sixth_step)
    (unfinished,) = loras(client) - known
    assert unfinished.endswith("unfinished_00001.safetensors")
    client.run(teach(seed=33, continue_from=unfinished))
    assert len(loras(client) - known) == 2


def test_cancel_of_the_last_look_at_other_pictures_loses_nothing(client, server, teach):
    known, said = loras(client), []

    def cancel_when_training_is_over(event):
        if event["type"] == "binary":
            said.append(event["data"])
            if b"Judging other pictures" in event["data"]:
                client.interrupt()

    with pytest.raises(PromptInterrupted):
        client.run(teach(seed=34, check_every=1), cancel_when_training_is_over)
    (unfinished,) = loras(client) - known
    assert any(b"Stopped after training" in text for text in said)
    with safe_open(server.base / "models" / "loras" / unfinished, "pt") as file:
        story = json.loads(file.metadata()["dual_process"])
    assert (story["stopped"], story["steps_done"], story["unseen"]) == ("all steps done", 3, [])


@pytest.mark.parametrize(
    "node, change, sentence",
    [
        ("DualProcessQuestion", {"text": " "}, "The question is empty"),
        ("DualProcessQuestion", {"answer": ""}, "The wanted answer to"),
    ],
)
def test_bad_input_gets_one_clear_sentence(client, teach, node, change, sentence):
    graph = teach(seed=51)
    graph[nodes_of(graph, node)[0]]["inputs"] |= change
    with pytest.raises(PromptFailed, match=sentence):
        client.run(graph)


def test_a_goal_that_is_held_already_ends_at_once_and_says_so(client, teach):
    graph, events = teach(seed=55, check_every=1, stop_at=0.0), []
    (trainer,) = nodes_of(graph, "DualProcessTrainer")
    graph["plot"] = {"class_type": "LossGraphNode", "inputs": {"loss": [trainer, 1], "filename_prefix": "loss"}}
    client.run(graph, events.append)
    texts = [event["data"] for event in events if event["type"] == "binary"]
    assert any(b"0 steps: held before the first step" in text for text in texts)


def test_a_bad_file_name_is_refused_before_the_training(client, teach):
    graph = teach(seed=53)
    (keeper,) = nodes_of(graph, "DualProcessSaveLoRA")
    for prefix in ("../../outside", "/outside", ""):
        graph[keeper]["inputs"]["filename_prefix"] = prefix
        with pytest.raises(PromptRejected, match="is not a file name inside"):
            client.run(graph)


def test_a_bad_file_name_in_the_front_end_costs_no_training(client, teach):
    """The front end queues such a graph all the same, and ComfyUI runs what is right in it."""
    graph, known, events = teach(seed=55, steps=1), loras(client), []
    trainer, keeper = (nodes_of(graph, kind)[0] for kind in ("DualProcessTrainer", "DualProcessSaveLoRA"))
    right = graph[keeper]["inputs"]["filename_prefix"]
    graph[keeper]["inputs"]["filename_prefix"] = "../outside"
    assert keeper in json.loads(client.post("/prompt", {"prompt": graph, "client_id": client.client_id}))["node_errors"]
    graph[keeper]["inputs"]["filename_prefix"] = right
    client.run(graph, events.append)
    cached = [event["data"]["nodes"] for event in events if event["type"] == "execution_cached"]
    assert trainer in cached[-1] and len(loras(client) - known) == 1


def test_a_file_name_from_another_node_is_checked_when_it_is_known(client, teach):
    graph = teach(seed=54, steps=1)
    (keeper,) = nodes_of(graph, "DualProcessSaveLoRA")
    graph["prefix"] = {"class_type": "PrimitiveString", "inputs": {"value": "../outside"}}
    graph[keeper]["inputs"]["filename_prefix"] = ["prefix", 0]
    with pytest.raises(PromptFailed, match="is not a file name inside"):
        client.run(graph)


def test_a_folder_that_is_no_judge_is_named(client, server, teach):
    folder = server.base / "models" / "VLM" / "only-a-config"
    folder.mkdir(parents=True)
    config = {"model_type": "idefics3", "architectures": ["Idefics3Model"], "vision_config": {}}
    (folder / "config.json").write_text(json.dumps(config))
    graph = teach(seed=52)
    graph[nodes_of(graph, "DualProcessJudgeLoader")[0]]["inputs"]["judge"] = "only-a-config"
    with pytest.raises(PromptFailed, match="only-a-config"):
        client.run(graph)


def test_a_judge_that_is_not_there_is_refused_unless_a_hub_id_stands_for_it(client, teach):
    graph = teach(seed=57)
    loader = graph[nodes_of(graph, "DualProcessJudgeLoader")[0]]["inputs"]
    loader["judge"] = "not-there"
    with pytest.raises(PromptRejected, match="There is no 'not-there' in models/VLM .* hub_id"):
        client.run(graph)
    loader["hub_id"] = "owner/name"
    with pytest.raises(PromptFailed, match="owner/name is not in .*: tick download"):
        client.run(graph)


@pytest.mark.parametrize("change", [{"steps": 0}, {"rank": 0}, {"stop_at": 2.0}])
def test_values_out_of_range_are_refused_before_anything_runs(client, teach, change):
    with pytest.raises(PromptRejected, match=next(iter(change))):
        client.run(teach(**change))
