"""ComfyUI's own front end in a headless Chromium, for the front-end test and the README's pictures."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
APP = "window.comfyAPI.app.app"


def find_browser() -> tuple[str, str] | None:
    """Paths of a Chromium and its driver, or None when either is missing."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


class FrontEnd:
    """One browser tab with ComfyUI's front end open; use as a context manager."""

    def __init__(self, url: str, size: tuple[int, int] = (1920, 1080)):
        self.url = url
        self._size = size

    def __enter__(self) -> FrontEnd:
        browser, driver = find_browser()
        options = webdriver.ChromeOptions()
        options.binary_location = browser
        for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "hide-scrollbars"):
            options.add_argument(f"--{flag}")
        options.add_argument(f"--window-size={self._size[0]},{self._size[1]}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self._driver = webdriver.Chrome(options, Service(driver))
        self._driver.set_script_timeout(120)
        try:
            self._driver.get(self.url)
            self.wait_for(f"return window.comfyAPI?.app && {APP}.vueAppReady && {APP}.graph?.nodes.length", 120)
        except BaseException:
            self._driver.quit()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._driver.quit()

    def script(self, code: str, *arguments: Any) -> Any:
        """Run JavaScript (`return …`, `await` allowed) with `app` and `args` in scope."""
        wrapped = f"""
            const done = arguments[arguments.length - 1], args = Array.from(arguments).slice(0, -1);
            (async () => {{ const app = {APP}; {code} }})().then(
                (value) => done({{ value }}), (error) => done({{ error: String(error) }}));
        """
        answer = self._driver.execute_async_script(wrapped, *arguments)
        if "error" in answer:
            raise RuntimeError(f"The front end raised {answer['error']}")
        return answer.get("value")

    def wait_for(self, expression: str, seconds: float = 60) -> Any:
        """Wait until JavaScript (`return …`) gives something true, and return it."""
        return WebDriverWait(self._driver, seconds).until(lambda driver: driver.execute_script(expression))

    def click(self, text: str) -> None:
        """Click the innermost visible element that says exactly this, as soon as there is one."""
        element = self.wait_for(
            "return [...document.querySelectorAll('span, div, h3, button')]"
            f".filter(e => e.textContent.trim() === {json.dumps(text)} && e.offsetParent).at(-1)"
        )
        self._driver.execute_script("arguments[0].click()", element)

    def open_template(self, pack: str, name: str) -> None:
        """Choose a template of a node pack in the front end's own template browser."""
        self.script("app.graph.clear(); await app.extensionManager.command.execute('Comfy.BrowseTemplates');")
        self.click(pack)
        self.click(name)
        self.wait_for(f"return {APP}.graph.nodes.length")

    def set_widgets(self, node_type: str, values: dict[str, Any]) -> None:
        """Type values into the widgets of the first node of a type."""
        self.script(
            "const node = app.graph.nodes.find(n => n.type === args[0]);"
            "for (const widget of node.widgets) if (widget.name in args[1]) widget.value = args[1][widget.name];",
            node_type,
            values,
        )

    def run(self, seconds: float = 300) -> None:
        """Press Run and wait until the queue is empty. Raises TimeoutException when it takes longer."""
        self.script("await app.queuePrompt(0); window.asked = window.idle = false;")
        self.wait_for(
            "if (!window.asked) { window.asked = true; fetch('/api/queue').then(r => r.json()).then(q => {"
            " window.idle = !q.queue_running.length && !q.queue_pending.length; window.asked = false; }); }"
            " const idle = window.idle; window.idle = false; return idle;",
            seconds,
        )

    def missing_nodes(self) -> list[str]:
        """Types on the canvas that the server does not know."""
        return self.script(
            "return app.graph.nodes.filter(n => !LiteGraph.registered_node_types[n.type]).map(n => n.type);"
        )

    def errors(self) -> list[str]:
        """What the page wrote to the console as errors."""
        return [entry["message"] for entry in self._driver.get_log("browser") if entry["level"] == "SEVERE"]

    def screenshot(self, path: Path, settle: float = 1.0) -> None:
        """Save what the window shows as a PNG, after a moment for it to be drawn."""
        time.sleep(settle)
        self._driver.save_screenshot(str(path))

    def saved(self) -> dict[str, Any]:
        """The open workflow in the form the front end saves."""
        return json.loads(self.script("return JSON.stringify(app.graph.serialize());"))
