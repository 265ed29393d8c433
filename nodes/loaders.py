"""Loading judges, and the prompt encoder of the bundled tiny student."""

from pathlib import Path

import comfy.model_management as mm
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io

from ..trainers.comfy_memory import ManagedJudge
from ..vlm.download import download_judge, place_of
from ..vlm.loading import ATTENTIONS, discover_adapters, discover_judges, load_judge
from .refusal import check_choices, refusal
from .types import CATEGORY, JudgeType

PACK = Path(__file__).parent.parent
TINY = PACK / "tiny"
BUNDLED_JUDGE, BUNDLED_GUIDE_READER = "tiny judge (bundled)", "tiny judge that reads guides (bundled)"
for kind in ("VLM", "LLM"):
    folder_paths.add_model_folder_path(kind, str(Path(folder_paths.models_dir) / kind))
folder_paths.add_model_folder_path("checkpoints", str(TINY / "models"))


NO_LORA = "none"
LOADED = {".json", ".jinja", ".model", ".safetensors", ".txt"}  # what files of a judge end in
BITS = {"none": None, "8-bit": 8, "4-bit": 4}


def roots() -> list[Path]:
    """The folders that judges and their LoRAs are looked for in."""
    return [Path(path) for kind in ("VLM", "LLM") for path in folder_paths.get_folder_paths(kind)]


def judges() -> dict[str, Path]:
    """Name -> folder of every judge in models/VLM and models/LLM, and the bundled ones."""
    bundled = {BUNDLED_JUDGE: TINY / "judge", BUNDLED_GUIDE_READER: TINY / "judge_of_guides"}
    return {**discover_judges(roots()), **bundled}


def hub_judge(hub_id: str, download: bool) -> Path:
    """Folder of a model of the Hub inside models/VLM, downloaded now if wished; Cancel stops that.

    Raises:
        ValueError: it is not a hub id, or the model is not there and no download is wished.
        ConnectionError: the download was cut off.
    """
    root = Path(folder_paths.models_dir) / "VLM"
    folder = place_of(hub_id, root)
    if not download and not (folder / "config.json").is_file():
        raise ValueError(f"{hub_id} is not in {folder}: tick download to fetch it from the Hugging Face Hub.")
    if not download:
        return folder
    bar = comfy.utils.ProgressBar(1)

    def report(done: int, total: int) -> None:
        mm.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return download_judge(hub_id, root, report)


def folder_and_root(found: dict[str, Path], name: str) -> tuple[Path, Path]:
    """Folder of a listed model, and the models folder that nothing in it may link out of."""
    if name not in found:
        raise ValueError(
            f"There is no '{name}' in models/VLM or models/LLM, or it was moved: put its folder there, or choose "
            "another (the tiny ones know nothing but the bundled model's pictures). A judge of the Hugging Face Hub "
            "can also be named in hub_id, as owner/name."
        )
    return found[name], found[name].parents[name.count("/")]


class JudgeLoader(io.ComfyNode):
    """A folder with a vision-language model -> VLM_JUDGE."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DualProcessJudgeLoader",
            display_name="VLM Judge Loader",
            category=CATEGORY,
            description="Loads a vision-language model that looks at pictures and answers questions about them.",
            inputs=[
                io.Combo.Input(
                    "judge",
                    options=list(judges()),
                    tooltip="A model folder (config.json, safetensors, tokenizer) inside models/VLM or models/LLM. "
                    "The bundled tiny judges only know the bundled tiny student's landscapes.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=["auto", "float32", "bfloat16", "float16"],
                    tooltip="Precision of the judge's weights. auto: as stored; float32 on a CPU.",
                ),
                *_further_inputs(),
            ],
            outputs=[JudgeType.Output(display_name="judge", tooltip="Connect to a trainer or to Ask the Judge.")],
        )

    @classmethod
    def execute(
        cls,
        judge,
        dtype,
        attention="auto",
        quantisation="none",
        system_prompt="",
        question_suffix="",
        prompt_template="",
        lora=NO_LORA,
        hub_id="",
        download=False,
    ):
        chosen = {"dtype": dtype, "attention": attention, "quantisation": quantisation}
        check_choices(cls.define_schema().inputs, chosen)
        hub_id = hub_id.strip()
        folder, root = folder_and_root({hub_id: hub_judge(hub_id, download)} if hub_id else judges(), hub_id or judge)
        adapter, adapter_root = (None, None) if lora == NO_LORA else folder_and_root(discover_adapters(roots()), lora)
        device = mm.get_torch_device()
        on_cpu = mm.is_device_cpu(device)
        if BITS[quantisation] is not None:  # bitsandbytes loads straight onto the device
            mm.free_memory(sum(file.stat().st_size for file in folder.glob("*.safetensors")), device)
        loaded = load_judge(
            folder,
            dtype=(torch.float32 if on_cpu else None) if dtype == "auto" else getattr(torch, dtype),
            attention=attention,
            root=root,
            system=system_prompt.strip(),
            suffix=question_suffix.strip(),
            template=prompt_template.strip(),
            adapter=adapter,
            adapter_root=adapter_root,
            bits=BITS[quantisation],
            name=hub_id or judge,
        )
        words = {"system_prompt": system_prompt, "question_suffix": question_suffix, "prompt_template": prompt_template}
        unusual = {name: value for name, value in {**chosen, "lora": lora}.items() if value not in ("auto", "none")}
        told = {name: text.strip() for name, text in words.items() if text.strip()}
        managed = ManagedJudge(loaded, choices=unusual | told)
        if BITS[quantisation] is not None:
            managed.load()  # it is on the device already; now ComfyUI knows
        return io.NodeOutput(managed)

    @classmethod
    def validate_inputs(cls, judge, hub_id=""):
        """ComfyUI itself would refuse an unlisted judge even where hub_id takes its place; what comes from another
        node is None here and checked later."""
        if hub_id is None or hub_id.strip():
            return True
        return refusal(lambda name: folder_and_root(judges(), name), judge)

    @classmethod
    def fingerprint_inputs(cls, judge, lora=NO_LORA, hub_id="", **_):
        """Names, times and sizes of the files of the judge, unless it is the Hub's, which is downloaded only once this
        is known, and of its LoRA."""
        folders = [None if hub_id else judges().get(judge), discover_adapters(roots()).get(lora)]
        return sorted(
            (file.name, file.stat().st_mtime_ns, file.stat().st_size)
            for folder in folders
            for file in (folder.iterdir() if folder else ())
            if file.suffix in LOADED and file.is_file()
        )


def _further_inputs() -> list[io.Input]:
    """What most users leave alone; all optional, so that workflows saved before these existed still run."""
    return [
        io.Combo.Input(
            "attention",
            options=list(ATTENTIONS),
            default="auto",
            optional=True,
            tooltip="How attention is computed. auto: the fastest that the model and PyTorch have. "
            "flash_attention_2 needs a GPU, 16-bit weights and the package flash-attn.",
        ),
        io.Combo.Input(
            "quantisation",
            options=list(BITS),
            default="none",
            optional=True,
            tooltip="Weights in 8 or 4 bits: less memory, a little less exact. Needs the package bitsandbytes.",
        ),
        io.String.Input(
            "system_prompt",
            default="",
            optional=True,
            tooltip="What the judge is told before every question; empty for nothing. Not together with a "
            "prompt_template, which holds all that it is told.",
        ),
        io.String.Input(
            "question_suffix",
            default="",
            optional=True,
            tooltip="Added to the end of every question, for example: Answer with Yes or No.",
        ),
        io.String.Input(
            "prompt_template",
            default="",
            optional=True,
            tooltip="For models without a chat template, and in place of one: the whole prompt, with {image} and "
            "{question} in it.",
        ),
        io.Combo.Input(
            "lora",
            options=[NO_LORA, *discover_adapters(roots())],
            default=NO_LORA,
            optional=True,
            tooltip="A LoRA for the judge (a PEFT folder inside models/VLM or models/LLM), merged into its weights.",
        ),
        io.String.Input(
            "hub_id",
            default="",
            optional=True,
            tooltip="Instead of judge: a model of the Hugging Face Hub, as owner/name, kept in models/VLM.",
        ),
        io.Boolean.Input(
            "download",
            default=False,
            optional=True,
            tooltip="Lets hub_id be downloaded into models/VLM. Without this tick nothing is ever downloaded.",
        ),
    ]


class TinyTextEncoder(io.ComfyNode):
    """The prompt encoder of the bundled student."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DualProcessTinyTextEncoder",
            display_name="Tiny Prompt Encoder",
            category=CATEGORY,
            description="Prompt encoder of the bundled tiny student (dual_process_tiny.safetensors). "
            "Any other model has its own CLIP.",
            inputs=[],
            outputs=[io.Clip.Output(display_name="clip", tooltip="Connect to CLIP Text Encode.")],
        )

    @classmethod
    def execute(cls):
        from ..tiny.text_encoder import load_tiny_clip

        return io.NodeOutput(load_tiny_clip())
