"""The start line that users have, word for word, and what they send: completions, chat, tools.

    python -m tests.gpu.start_line --work DIR --out FILE

The model is the tiny GLM-4-MoE in FP8, with a tokenizer that has the words of GLM's parsers. It takes
both GPUs whole (--gpu-memory-utilization 0.95).
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.gpu.chat_checkpoint import MAX_MODEL_LEN, make_chat_checkpoint
from tests.gpu.engine import Expected
from tests.gpu.kinds_cases import ALL
from tests.gpu.server import Server, write_checks

MODEL = "GLM-4.5-Air"
# Served name -> adapter of glm16: shard directories, and one as the trainer wrote it.
ADAPTERS = {
    "test-lora-1": "e0.shards",
    "test-lora-2": "e1.shards",
    "test-lora-3": "fused0.shards",
    "test-lora-4": "e2",
}
PORT = 8000
# Between two ways of asking the same. FP8 without an adapter differs by up to 0.036 from itself.
SAME, CHANGED = 0.1, 0.1
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
TOOL_CALL = (
    "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>"
)


def start_line(model: Path, adapters: Mapping[str, Path]) -> list[str]:
    """The users' command, with these paths."""
    return [
        *("-m", "vllm.entrypoints.cli.main", "serve", str(model)),
        *("--gpu-memory-utilization", "0.95", "--max-model-len", str(MAX_MODEL_LEN)),
        *("--port", str(PORT), "--max-num-seqs", "16", "-tp", "2"),
        *("--tool-call-parser", "glm45", "--reasoning-parser", "glm45"),
        *("--enable-auto-tool-choice", "--served-model-name", MODEL, "--fully-sharded-loras"),
        *("--enable-lora", "--max-lora-rank", "32", "--max-loras", "4", "--max-cpu-loras", "4"),
        *("--lora-modules", *(f"{name}={path}" for name, path in adapters.items())),
        "--enable-expert-parallel",
    ]


class _Session:
    """The checks, in order; each leaves one line."""

    def __init__(self, server: Server, expected: Expected) -> None:
        self._server, self._expected = server, expected
        self._base = server.log_probs(MODEL, expected.prompts)
        self.lines: list[dict[str, Any]] = []

    def _report(self, check: str, right: bool, **more: Any) -> None:
        self.lines.append({"check": check, "right": right, **more})
        print("RESULT", json.dumps(self.lines[-1]), flush=True)

    def models(self) -> None:
        """/v1/models names the model and its adapters."""
        _, body = self._server.get("/v1/models")
        names = {entry["id"] for entry in json.loads(body)["data"]}
        self._report("models", names == {MODEL, *ADAPTERS}, names=sorted(names))

    def completions(self) -> None:
        """Against the float32 reference."""
        for served, directory in ADAPTERS.items():
            got = self._server.log_probs(served, self._expected.prompts)
            line = self._expected.judge(directory.partition(".")[0], got, self._base)
            self._report(f"completions of {served}", line.pop("right"), **line)

    def chat(self, served: str, base: list[float] | None) -> list[float]:
        """A chat is the completion of the prompt that the template makes of it.

        base: the base model's log-probabilities, which an adapter's must differ from.
        """
        answer = self._ask_chat(served, prompt_logprobs=1, return_token_ids=True)
        tokens = [int(token) for token in answer["prompt_token_ids"]]
        got = _of_tokens(tokens, answer["prompt_logprobs"])
        _, body = self._server.post(
            "/v1/completions",
            {"model": served, "prompt": tokens, "max_tokens": 1, "prompt_logprobs": 1},
        )
        same = _of_tokens(tokens, json.loads(body)["choices"][0]["prompt_logprobs"])
        differs = _distance(got, same)
        changed = None if base is None else _distance(got, base)
        right = differs < SAME and (changed is None or changed > CHANGED)
        self._report(f"chat with {served}", right, differs=differs, changed=changed)
        return got

    def streamed_chat(self) -> None:
        """It ends as it should, with all the tokens that were asked for."""
        _, body = self._server.post(
            "/v1/chat/completions",
            _chat("test-lora-1") | {"stream": True, "stream_options": {"include_usage": True}},
        )
        events = [line[6:] for line in body.splitlines() if line.startswith("data: ")]
        usage = [json.loads(event).get("usage") for event in events[:-1]]
        tokens = [u["completion_tokens"] for u in usage if u]
        right = events[-1:] == ["[DONE]"] and tokens[-1:] == [8]
        self._report("streamed chat", right, events=len(events), tokens=tokens[-1:])

    def tools(self) -> None:
        """A request with tools is answered, and a tool call in the answer is found.

        The model knows no tools, so the second request prescribes the text.
        """
        status, body = self._server.post(
            "/v1/chat/completions", _chat("test-lora-1") | {"tools": TOOLS}
        )
        self._report("chat with tools", status == 200, status=status, body=body[:300])
        changes = {
            "tools": TOOLS,
            "max_tokens": 200,
            "structured_outputs": {"choice": [TOOL_CALL]},
            "chat_template_kwargs": {"enable_thinking": False},
        }
        message = self._ask_chat("test-lora-1", **changes)["choices"][0]["message"]
        calls = [call["function"] for call in message.get("tool_calls") or ()]
        right = [call["name"] for call in calls] == ["get_weather"] and json.loads(
            calls[0]["arguments"]
        ) == {"city": "Paris"}
        self._report("a tool call", right, message=json.dumps(message)[:300])

    def _ask_chat(self, served: str, **changes: Any) -> dict[str, Any]:
        status, body = self._server.post("/v1/chat/completions", _chat(served) | changes)
        if status != 200:
            raise RuntimeError(f"chat with {served}: {status} {body[:500]}")
        document: dict[str, Any] = json.loads(body)
        return document


def _chat(served: str) -> dict[str, Any]:
    messages = [
        {"role": "system", "content": "You are a weather station."},
        {"role": "user", "content": "What is the weather in Paris?"},
    ]
    return {
        "model": served, "messages": messages, "max_tokens": 8, "temperature": 0, "ignore_eos": True
    }  # fmt: skip


def _of_tokens(tokens: list[int], answered: list[Any]) -> list[float]:
    """Log-probabilities of all tokens but the first."""
    return [float(place[str(token)]["logprob"]) for token, place in zip(tokens[1:], answered[1:])]


def _distance(one: list[float], other: list[float]) -> float:
    return round(sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one), 4)


def _run_checks(session: _Session) -> None:
    session.models()
    session.completions()
    base = session.chat(MODEL, None)
    for served in ADAPTERS:
        session.chat(served, base)
    session.streamed_chat()
    session.tools()


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.start_line")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    directory = args.work / "models" / "glm16"
    model = make_chat_checkpoint(directory / "model_fp8", directory / "model_chat")
    adapters = {name: directory / adapter for name, adapter in ADAPTERS.items()}
    command = start_line(model, adapters)
    document: dict[str, Any] = {"command": " ".join(command[2:]), "checks": []}
    server = Server(command, args.out.with_name("start-line.log"), port=PORT)
    try:
        document["started"] = round(server.wait(), 1)
        case = next(case for case in ALL if case.name == "glm16-fp8")
        session = _Session(server, Expected.load(args.work, case))
        document["checks"] = session.lines
        _run_checks(session)
    except (RuntimeError, OSError, KeyError, ValueError) as err:
        document["failure"] = f"{type(err).__name__}: {err}"[:1000]
    finally:
        server.end()
    write_checks(document, args.out)


if __name__ == "__main__":
    _main()
