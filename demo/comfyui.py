"""ComfyUI for the demo, the tests and the benchmarks: imported into this process, or started as a server."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

PACK = Path(__file__).resolve().parents[1]
START_SECONDS = 240
STOP_SECONDS = 10


def comfyui_folder() -> Path:
    """The ComfyUI to use: COMFYUI_PATH, else the one dev.py unpacked. Raises FileNotFoundError when there is none."""
    named = os.environ.get("COMFYUI_PATH")
    candidates = [Path(named)] if named else sorted((PACK / ".comfyui").glob("*/"))
    for folder in candidates:
        if (folder / "comfyui_version.py").is_file():
            return folder.resolve()
    raise FileNotFoundError("No ComfyUI found; run 'python3 dev.py test' once, or set COMFYUI_PATH to its folder.")


def make_base_directory(base: Path) -> None:
    """Make a ComfyUI base directory (models, custom_nodes, output, …) of our own, with this pack linked into it."""
    for name in ("custom_nodes", "input", "models/loras", "output", "user"):
        (base / name).mkdir(parents=True, exist_ok=True)
    link = base / "custom_nodes" / "dual_process"
    if not link.exists():
        if os.name == "nt":
            import _winapi

            _winapi.CreateJunction(str(PACK), str(link))
        else:
            link.symlink_to(PACK, target_is_directory=True)
    # A model path file of the user's may put their folders first; ours must be where new LoRAs are written.
    paths = {"dual_process_dev": {"base_path": str(base), "is_default": True, "loras": "models/loras"}}
    (base / "extra_model_paths.yaml").write_text(json.dumps(paths))  # JSON is YAML


def has_accelerator() -> bool:
    """Whether torch sees a device that ComfyUI would use instead of the CPU."""
    import torch

    return torch.cuda.is_available() or torch.backends.mps.is_available()


def use_comfyui(base: Path) -> None:
    """Make `import comfy`, `import nodes` and the rest work in this process, with `base` as base directory.

    Must run before anything imports ComfyUI. Raises FileNotFoundError when no ComfyUI is found.
    """
    sys.path.insert(0, str(comfyui_folder()))
    make_base_directory(base)
    from comfy.cli_args import args

    args.base_directory = str(base)
    args.cpu = not has_accelerator()


class ComfyServer:
    """A ComfyUI server as a context manager: `url` answers inside the block, and the process is gone after it.

    `base` becomes its base directory, `log` receives everything it prints. Raises RuntimeError with the end of the
    log when the server does not come up.
    """

    def __init__(self, base: Path, log: Path):
        self.base, self.log = base, log
        self.comfyui = comfyui_folder()
        self.url = ""
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> ComfyServer:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # being told to end must not leave a server behind
        make_base_directory(self.base)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "main.py", "--port", str(port), "--base-directory", str(self.base)]
        command += ["--extra-model-paths-config", str(self.base / "extra_model_paths.yaml")]
        command += ["--database-url", f"sqlite:///{self.base / 'user' / 'comfyui.db'}"]
        command += ["--disable-auto-launch", "--disable-api-nodes"] + ([] if has_accelerator() else ["--cpu"])
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
        variables |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                command, cwd=self.comfyui, env=variables, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=os.name != "nt",
            )
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server and everything it started."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        self._signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGTERM if os.name == "nt" else signal.SIGKILL)
            process.wait(STOP_SECONDS)

    def log_tail(self, lines: int = 40) -> str:
        """The last lines of the server's log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _signal(self, number: int) -> None:
        if os.name == "nt":
            self._process.terminate()
        else:
            os.killpg(self._process.pid, number)

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"ComfyUI stopped while starting.\nThe end of {self.log}:\n{self.log_tail()}")
            try:
                with urllib.request.urlopen(f"{self.url}/system_stats", timeout=5):
                    return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)
        raise RuntimeError(f"ComfyUI was silent for {START_SECONDS} s.\nThe end of {self.log}:\n{self.log_tail()}")
