"""Socket types of the pack, and ComfyUI's own that it speaks."""

from comfy_api.latest import io

CATEGORY = "dual process"
JudgeType = io.Custom("VLM_JUDGE")  # trainers.comfy_memory.ManagedJudge
QuestionsType = io.Custom("DUAL_PROCESS_QUESTIONS")  # list[vlm.question.Question]
GuideType = io.Custom("DUAL_PROCESS_GUIDE")  # vlm.overlay.Guide
PromptsType = io.Custom("DUAL_PROCESS_PROMPTS")  # list of CONDITIONINGs
ReportType = io.Custom("DUAL_PROCESS_REPORT")  # trainers.report.Report
LoRAType = io.Custom("LORA_MODEL")  # core: dict of tensors
LossType = io.Custom("LOSS_MAP")  # core: {"loss": [float, ...]}
