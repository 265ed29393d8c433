"""A small synchronous client for ComfyUI's HTTP API and websocket."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import websocket

Graph = dict[str, dict[str, Any]]
Event = dict[str, Any]
FINISHED = {"execution_success", "execution_error", "execution_interrupted"}


class PromptRejected(RuntimeError):
    """ComfyUI refused a graph before running it; the message holds its reasons."""


class PromptFailed(RuntimeError):
    """A node raised an error while the graph ran; the message names the node."""


class PromptInterrupted(RuntimeError):
    """The graph was cancelled."""


class ComfyClient:
    """One websocket session with a ComfyUI server; use as a context manager."""

    def __init__(self, url: str):
        self.url = url
        self.client_id = uuid.uuid4().hex

    def __enter__(self) -> ComfyClient:
        self._socket = websocket.create_connection(f"{self.url.replace('http', 'ws', 1)}/ws?clientId={self.client_id}")
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def get(self, path: str) -> bytes:
        """Body of a GET request; raises urllib.error.HTTPError for a bad status."""
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read()

    def get_json(self, path: str) -> Any:
        """Parsed JSON of a GET request."""
        return json.loads(self.get(path))

    def post(self, path: str, body: Any) -> bytes:
        """Send JSON; returns the answer's body, raises urllib.error.HTTPError for a bad status."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def queue(self, graph: Graph) -> str:
        """Queue a graph in API form and return its prompt id.

        Raises PromptRejected when any part of it is invalid (ComfyUI would run the other parts).
        """
        try:
            answer = json.loads(self.post("/prompt", {"prompt": graph, "client_id": self.client_id}))
        except urllib.error.HTTPError as error:
            raise PromptRejected(error.read().decode()) from error
        if answer["node_errors"]:
            self.post("/queue", {"delete": [answer["prompt_id"]]})
            raise PromptRejected(json.dumps(answer["node_errors"]))
        return answer["prompt_id"]

    def interrupt(self) -> None:
        """What the Cancel button does."""
        self.post("/interrupt", {})

    def events(self, prompt_id: str, timeout: float) -> Iterator[Event]:
        """Events of one prompt until it is finished; binary frames come as {"type": "binary", "data": bytes}.

        Raises TimeoutError when the prompt is not finished after `timeout` seconds, ConnectionError when the server
        ends.
        """
        deadline = time.monotonic() + timeout
        while True:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                frame = self._socket.recv()
            except websocket.WebSocketTimeoutException as error:
                raise TimeoutError(f"the prompt was not finished after {timeout:.0f} s") from error
            except websocket.WebSocketConnectionClosedException:
                frame = ""
            if not frame:
                raise ConnectionError("ComfyUI ended before the prompt was finished.")
            if isinstance(frame, bytes):
                yield {"type": "binary", "data": frame}
                continue
            event = json.loads(frame)
            if event["data"].get("prompt_id", prompt_id) != prompt_id:
                continue
            yield event
            if event["type"] in FINISHED:
                return

    def run(self, graph: Graph, on_event: Callable[[Event], None] | None = None, timeout: float = 600) -> Event:
        """Queue a graph, follow it to its end and return {node id: what the node showed}.

        Raises PromptRejected, PromptFailed, PromptInterrupted, TimeoutError or ConnectionError.
        """
        prompt_id, outputs = self.queue(graph), {}
        for event in self.events(prompt_id, timeout):
            if on_event:
                on_event(event)
            if event["type"] == "executed":
                outputs[event["data"]["node"]] = event["data"]["output"]
            if event["type"] == "execution_error":
                data = event["data"]
                raise PromptFailed(f"{data['node_type']} (node {data['node_id']}): {data['exception_message'].strip()}")
            if event["type"] == "execution_interrupted":
                raise PromptInterrupted(f"prompt {prompt_id} was cancelled")
        return outputs

    def picture(self, shown: dict[str, str]) -> bytes:
        """The bytes of one picture a node showed ({"filename", "subfolder", "type"})."""
        return self.get("/view?" + urllib.parse.urlencode(shown))
