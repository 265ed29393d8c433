"""`python3 dev.py screenshot`: run the first template in ComfyUI's own front end and take the README's picture."""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path

from PIL import Image

from .client import ComfyClient
from .comfyui import PACK, ComfyServer
from .frontend import FrontEnd

TEMPLATE = "Teach the horizon"
PICTURE = PACK / "docs" / "front_end.jpg"
WINDOW, SCALE, CORNER = (2000, 1300), 0.76, (120, 135)  # px, zoom, where the first group starts
WIDTH = 1600  # px of the saved picture
LONGEST = 3600  # s
TIDY = """
    document.querySelector('.bg-gradient-to-r i[class*="lucide--x"]')?.closest("button").click();
    app.canvas.ds.scale = args[0];
    app.canvas.ds.offset = args[1];
    app.canvas.setDirty(true, true);
"""


def main() -> None:
    """Open the template, press Run, wait and save what the window shows."""
    parser = argparse.ArgumentParser(prog="dev.py screenshot", description=main.__doc__)
    parser.add_argument("--steps", type=int, help="training steps, instead of the template's")
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        with ComfyServer(base, base / "comfyui.log") as server:
            ComfyClient(server.url).post("/settings", {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False})
            with FrontEnd(server.url, WINDOW) as page:
                page.open_template("dual_process", TEMPLATE)
                page.script(TIDY, SCALE, CORNER)
                if steps:
                    page.set_widgets("DualProcessTrainer", {"steps": steps})
                page.run(LONGEST)
                page.screenshot(base / "shown.png", 3)
            picture = Image.open(io.BytesIO((base / "shown.png").read_bytes())).convert("RGB")
    small = picture.resize((WIDTH, round(WIDTH * picture.height / picture.width)), Image.Resampling.LANCZOS)
    small.save(PICTURE, quality=85)
    print(f"wrote {PICTURE}")


if __name__ == "__main__":
    main()
