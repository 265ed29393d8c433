"""Fetching a judge from the Hugging Face Hub. Called only when a user typed a hub id and ticked the box."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

# Weights as safetensors only, and none of the repository's code.
WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]


def place_of(hub_id: str, root: Path) -> Path:
    """The folder ``root/<owner>/<name>`` of a model of the Hub; raises ValueError when the id has another form."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", hub_id, re.ASCII):
        raise ValueError(f'"{hub_id}" is no hub id: it has the form owner/name, such as Qwen/Qwen2.5-VL-7B-Instruct.')
    return root.joinpath(*hub_id.split("/"))


def download_judge(hub_id: str, root: Path, report: Callable[[int, int], None] = lambda done, total: None) -> Path:
    """Download a model into ``root/<owner>/<name>``; what an interrupted download left there is continued.

    Args:
        hub_id: "owner/name" on the Hub.
        root: a models folder, such as ComfyUI's models/VLM.
        report: called with what is done and the total, in bytes where the installed huggingface_hub counts them, else
            in files; may raise to stop the download.

    Returns:
        The model's folder.

    Raises:
        ValueError: the id is none, or the Hub does not know it or does not give it away.
        ConnectionError: the Hub cannot be reached, or the disk is full.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError

    folder = place_of(hub_id, root)
    bar = _reporting_bar(report)
    try:
        snapshot_download(
            hub_id, local_dir=folder, allow_patterns=WANTED, ignore_patterns=["*/*"], tqdm_class=bar, token=None
        )
    except (HTTPError, LocalEntryNotFoundError, OSError) as error:
        if isinstance(error, HfHubHTTPError) and not isinstance(error, LocalEntryNotFoundError):
            raise ValueError(
                f"The Hub does not give {hub_id} away ({_first_line(error)}): check the id and the model's terms."
            ) from error
        raise ConnectionError(
            f"{hub_id} could not be downloaded ({_first_line(error)}): check the connection and the disk and try again "
            f"(what is there is kept), or copy the model's folder to {folder} by hand."
        ) from error
    return folder


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _reporting_bar(report: Callable[[int, int], None]) -> type:
    """A silent progress bar class that hands its counts to ``report``; bytes win over files."""
    from tqdm import tqdm

    kinds = set()

    class Bar(tqdm):
        def __init__(self, *args, **kwargs):
            kwargs.pop("name", None)  # huggingface_hub's own bar takes a name
            super().__init__(*args, **{**kwargs, "disable": False, "file": _Nowhere()})
            kinds.add(self.unit)

        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
            if self.total and (self.unit == "B" or "B" not in kinds):
                report(int(self.n), int(self.total))
            return shown

    return Bar


class _Nowhere:
    """A text stream that keeps nothing."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass
