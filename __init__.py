"""Dual-Process for ComfyUI: teach the loaded image model from a vision-language model's answers."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The pack's extension; ComfyUI calls this. The nodes are imported only here, since they need ComfyUI."""
    from .nodes import DualProcessExtension

    return DualProcessExtension()
