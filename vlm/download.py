"""Fetching a judge from the Hugging Face Hub. Called only when a user typed a hub id and ticked the box."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

# Weights as safetensors only, and none of the repository's code.
WANTED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
SECOND_COPY = "consolidated*"  # the weights once more, as Mistral's own programs read them
LAST = "config.json"  # comes last: where it is, everything else is too


def place_of(hub_id: str, root: Path) -> Path:
    """The folder ``root/<owner>/<name>`` of a model of the Hub; raises ValueError when the id has another form."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", hub_id, re.ASCII):
        raise ValueError(f'"{hub_id}" is not a hub id, which has the form owner/name: Qwen/Qwen2.5-VL-7B-Instruct.')
    return root.joinpath(*hub_id.split("/"))


def download_judge(hub_id: str, root: Path, report: Callable[[int, int], None] = lambda done, total: None) -> Path:
    """Download a model into ``root/<owner>/<name>``; what an interrupted download left there is continued.

    Files under way are called ``<name>.<id of its content>.part``. A complete model is not asked for again. (The Hub's
    own ``snapshot_download`` throws the file it was at away when it is stopped, since its version 2.)

    Args:
        hub_id: "owner/name" on the Hub.
        root: a models folder, such as ComfyUI's models/VLM.
        report: called with the bytes done and in total; may raise to stop the download.

    Returns:
        The model's folder.

    Raises:
        ValueError: it is not a hub id, or the Hub does not know it or refuses it.
        ConnectionError: the Hub cannot be reached, or the disk is full.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError

    folder = place_of(hub_id, root)
    if (folder / LAST).is_file():
        return folder
    try:
        _fetch_all(HfApi().model_info(hub_id, files_metadata=True), folder, report)
    except (HTTPError, OSError) as error:
        if isinstance(error, HfHubHTTPError) and not isinstance(error, LocalEntryNotFoundError):
            raise ValueError(
                f"The Hub refuses {hub_id} ({_first_line(error)}): check the id, and accept the model's terms there."
            ) from error
        raise ConnectionError(
            f"{hub_id} could not be downloaded ({_first_line(error)}): check the connection and the disk and try again "
            f"(what is there is kept), or copy the model's folder to {folder} by hand."
        ) from error
    return folder


def _fetch_all(info, folder: Path, report: Callable[[int, int], None]) -> None:
    """Download the wanted files of a ``ModelInfo`` that are not there yet, as they are at its commit."""
    from huggingface_hub import hf_hub_url

    files = [file for file in info.siblings if "/" not in file.rfilename and _wanted(file.rfilename)]
    files.sort(key=lambda file: file.rfilename == LAST)
    folder.mkdir(parents=True, exist_ok=True)
    done, total = 0, sum(file.size for file in files)
    for file in files:
        target = folder / file.rfilename
        if not (target.is_file() and target.stat().st_size == file.size):
            part = folder / f"{file.rfilename}.{file.blob_id}.part"
            url = hf_hub_url(info.id, file.rfilename, revision=info.sha)
            _fetch(url, part, file.size, lambda bytes_of_file, before=done: report(before + bytes_of_file, total))
            part.replace(target)
        done += file.size
        report(done, total)


def _fetch(url: str, part: Path, size: int, report: Callable[[int], None]) -> None:
    """Append what ``part`` lacks."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    part.touch()
    with _Counting(part, report) as out:
        http_get(url, out, resume_size=out.seek(0, io.SEEK_END), headers=build_hf_headers(), expected_size=size)


class _Counting(io.FileIO):
    """A file that reports its length after every write."""

    def __init__(self, path: Path, report: Callable[[int], None]):
        super().__init__(path, "r+")
        self.report = report

    def write(self, data: bytes) -> int:
        written = super().write(data)
        self.report(self.tell())
        return written


def _wanted(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in WANTED) and not fnmatch(name, SECOND_COPY)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
