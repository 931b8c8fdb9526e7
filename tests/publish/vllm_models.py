"""Run inside a vLLM release: a Publisher, and vLLM's own OpenAIServingModels behind HTTP.

What vLLM's routers do around it (entrypoints/serve/lora/api_router.py) is here: a status and a body
for each answer. The engine below it only notes what it is told to load. Nothing makes tokens, so a
completion is an answer if the name is known. test_vllm_conformance.py says what is right.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm.entrypoints.openai.models import serving

from lorashard import LorashardError, Publisher, SplitRequest, split_adapter
from tests.tiny import per_expert_tensors, save_adapter


class ServingModels(ThreadingHTTPServer):
    """vLLM's models; refused: names that the engine does not load."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.refused: set[str] = set()
        self.loads: list[str] = []
        self.loop = asyncio.new_event_loop()
        config = SimpleNamespace(max_model_len=64, model="base")
        engine = SimpleNamespace(
            model_config=config, vllm_config=SimpleNamespace(model_config=config, lora_config=None),
            add_lora=self._add_lora,
            input_processor=None, io_processor=None, renderer=None, processor=None,
        )  # fmt: skip
        base = [SimpleNamespace(name="base", model_path="base")]
        self.models: Any = serving.OpenAIServingModels(engine, base)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    async def _add_lora(self, request: Any) -> bool:
        if request.lora_name in self.refused:
            raise ValueError(f"{request.lora_name} does not fit")
        self.loads.append(request.lora_name)
        return True

    @contextmanager
    def running(self) -> Iterator[ServingModels]:
        for work in (self.loop.run_forever, lambda: self.serve_forever(0.02)):
            threading.Thread(target=work, daemon=True).start()
        yield self
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: ServingModels

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        self._answer(self.server.models.show_available_models())

    def do_POST(self) -> None:
        document = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        models = self.server.models
        if self.path == "/v1/load_lora_adapter":
            wish = serving.LoadLoRAAdapterRequest(**document)
            self._answer(models.load_lora_adapter(wish))
        elif self.path == "/v1/unload_lora_adapter":
            gone = serving.UnloadLoRAAdapterRequest(**document)
            self._answer(models.unload_lora_adapter(gone))
        else:
            known = document["model"] in models.lora_requests
            self._send(200 if known else 404, json.dumps({"choices": [{"text": "a"}]}))

    def _answer(self, call: Any) -> None:
        try:
            found = asyncio.run_coroutine_threadsafe(call, self.server.loop).result()
        except ValueError as err:  # 0.20.2 and 0.22.1 leave the engine's to a handler of the app's
            self._send(500, json.dumps({"error": {"message": str(err)}}))
            return
        status = found.error.code if hasattr(found, "error") else 200
        self._send(status, found if isinstance(found, str) else found.model_dump_json())

    def _send(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Quiet."""


def run_all() -> dict[str, Any]:
    """What each server has loaded in all, and knows in the end; and what was said of a refusal."""
    folder = Path(tempfile.mkdtemp(dir=Path.cwd()))
    with ServingModels().running() as one, ServingModels().running() as two:
        publisher = Publisher(folder / "versions", "policy", servers=[one.url, two.url], keep=2)
        for version in range(4):
            adapter = save_adapter(folder / f"adapter-{version}", per_expert_tensors(version))
            split_adapter(adapter, publisher.path(version), SplitRequest(ep_size=2))
        for version in (0, 1, 1):
            publisher.publish(version)
        two.refused.add("policy-v00002")
        try:
            publisher.publish(2)
            refusal = ""
        except LorashardError as err:
            refusal = str(err)
        # As if it had started again.
        two.models.lora_requests.clear()
        left = publisher.publish(3).removal.left
        return {
            "loads": [one.loads, two.loads],
            "known": [sorted(server.models.lora_requests) for server in (one, two)],
            "refusal": refusal.replace(two.url, "TWO"),
            "left": left,
            "present": sorted(path.name for path in (folder / "versions").glob("policy-*")),
        }
