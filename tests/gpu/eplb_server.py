"""A real `vllm serve` with EPLB: adapters are served, loaded and unloaded while experts move.

python -m tests.gpu.eplb_server --work DIR --out FILE
"""

import argparse
import json
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.gpu.cases import CASES
from tests.gpu.engine import Expected
from tests.gpu.eplb_cases import STEP_INTERVAL, WINDOW_SIZE, model_of
from tests.gpu.server import Server, serve_command

NUM_ROUNDS = 4
SERVED = {"a": "e0", "b": "e1", "c": "fused0"}
LATE = "e2"  # loaded and unloaded at run time
SHARDS = (*SERVED.values(), LATE)  # adapters that must be there as shards
EPLB: dict[str, Any] = {
    "window_size": WINDOW_SIZE,
    "step_interval": STEP_INTERVAL,
    "use_async": True,
    "num_redundant_experts": 4,
    "communicator": "torch_gloo",
}


class _Traffic:
    """Requests for all models, so that the engine makes steps all the time."""

    def __init__(self, server: Server, prompts: Any) -> None:
        self._over = threading.Event()
        self._server, self._prompts = server, prompts
        names = ("base", *SERVED)
        self._threads = [threading.Thread(target=self._run, args=(name,)) for name in names]
        self.failures: list[str] = []

    def begin(self) -> None:
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _run(self, name: str) -> None:
        number = 0
        while not self._over.is_set():
            prompt = self._prompts[number % len(self._prompts)][number % 7 :].tolist()
            number += 1
            body = {"model": name, "prompt": prompt, "max_tokens": 24, "ignore_eos": True}
            status, text = self._server.post("/v1/completions", body)
            if status != 200:
                self.failures.append(f"{name}: {status} {text[:200]}")
                return


def _session(server: Server, expected: Expected, directory: Path) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    base = server.log_probs("base", expected.prompts)

    def answers(served: str, adapter: str, what: str) -> None:
        line = expected.judge(adapter, server.log_probs(served, expected.prompts), base)
        lines.append({"check": f"{what} {served} ({adapter})", **line})

    traffic = _Traffic(server, expected.prompts)
    traffic.begin()
    try:
        for number in range(NUM_ROUNDS):
            for served, adapter in SERVED.items():
                answers(served, adapter, f"round {number}")
            late = f"late{number}"
            path = str(directory / (LATE if number % 2 else f"{LATE}.shards"))
            status, text = server.post(
                "/v1/load_lora_adapter", {"lora_name": late, "lora_path": path}
            )
            lines.append({"check": f"load {late}", "right": status == 200, "body": text[:200]})
            answers(late, LATE, f"round {number}")
            status, _ = server.post("/v1/unload_lora_adapter", {"lora_name": late})
            lines.append({"check": f"unload {late}", "right": status == 200})
    finally:
        traffic.end()
    lines.append({"check": "traffic", "right": not traffic.failures, "body": traffic.failures[:2]})
    return lines


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.eplb_server")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    model = model_of(EPLB["num_redundant_experts"])
    case = replace(next(c for c in CASES if c.name == "glm16-fp8"), model=model)
    directory = args.work / "models" / model
    log = args.out.with_suffix("") / "vllm-serve.log"  # a folder of its own: metrics lie beside it
    log.parent.mkdir(parents=True, exist_ok=True)
    command = serve_command(
        directory / "model_fp8", lambda adapter: directory / f"{adapter}.shards", SERVED
    )
    command += ["--enable-eplb", "--eplb-config", json.dumps(EPLB), "--enforce-eager"]
    server = Server(command, log)
    document: dict[str, Any] = {"checks": []}
    try:
        document["started"] = round(server.wait(), 1)
        document["checks"] = _session(server, Expected.load(args.work, case), directory)
    except (RuntimeError, OSError) as err:
        document["failure"] = str(err)[:1000]
    finally:
        server.end()
    text = log.read_text(errors="replace")
    document["rearrangements"] = len(re.findall("hold other experts now", text))
    checks = document["checks"]
    wrong = [check for check in checks if not check["right"]]
    document["as_expected"] = bool(checks) and not wrong and document["rearrangements"] > 0
    document["wrong"] = wrong
    errors = [check["error"] for check in checks if "error" in check]
    document["errors"] = [min(errors, default=9.0), max(errors, default=9.0)]
    args.out.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    _main()
