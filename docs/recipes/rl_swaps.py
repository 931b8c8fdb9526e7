"""Swap a LoRA adapter on a live vLLM server at every step, as a reinforcement-learning loop does.

    python rl_swaps.py --server http://127.0.0.1:8000 --adapter my-adapter --ep-size 2 \
        --steps 300 --keep 2 --workdir /shards --pid "$(pgrep -of 'vllm serve')"

Each step writes new weights as shards, publishes them under a new name and from a new path, asks the
server, and removes the oldest version. The training step is stood in for by scaling lora_B, so that
a version's answers are known: those of the last version with the same scale. One JSON document goes
to stdout, one line a step to stderr; the exit status is 1 if an answer was another version's.

The server needs --enable-lora, --max-cpu-loras of at least KEEP + 1 and, in its environment,
VLLM_ALLOW_RUNTIME_LORA_UPDATING=1. It must see --workdir under the same path.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from watch_server import cache_hits, columns, flatness, gpu_memory, memory_of_tree

import lorashard

SCALES = (1.0, -1.0, 0.5, -0.5, 0.75, -0.75, 1.25, -1.25)
# Long enough for blocks of vLLM's prefix cache.
PROMPTS = ("The router chooses an expert for this token. " * 5, "def swap(adapter, step): " * 8)
GPU_EVERY = 10  # nvidia-smi takes a while


class Server:
    """vLLM's HTTP endpoints, as far as lorashard.Publisher does not use them."""

    def __init__(self, url, prompts):
        self.url = url.rstrip("/")
        self.prompts = [self._token_ids(prompt) for prompt in prompts]

    def post(self, path, document):
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url + path, json.dumps(document).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError as err:
            raise RuntimeError(f"{path}: {err.code} {err.read().decode()[:500]}") from err

    def _token_ids(self, prompt):
        if not isinstance(prompt, str):
            return prompt
        return json.loads(self.post("/tokenize", {"prompt": prompt}))["tokens"]

    def ask(self, model, *, of_prompt):
        """Log-probabilities of the prompts' tokens, and of the likeliest tokens that follow.

        vLLM reads its prefix cache only where those of the prompt are not asked for.
        """
        question = {"model": model, "prompt": self.prompts, "max_tokens": 1, "temperature": 0}
        question |= {"logprobs": 5, "return_tokens_as_token_ids": True}
        question |= {"prompt_logprobs": 1} if of_prompt else {}
        prompt, following = {}, {}
        for choice in json.loads(self.post("/v1/completions", question))["choices"]:
            n, likeliest = choice["index"], choice["logprobs"]["top_logprobs"][0]
            following |= {(n, token): value for token, value in likeliest.items()}
            told = zip(self.prompts[n][1:], (choice.get("prompt_logprobs") or ())[1:])
            prompt |= {(n, i): t[str(token)]["logprob"] for i, (token, t) in enumerate(told)}
        return prompt, following


def train(adapter, scale):
    """What a training step would leave in memory: the adapter with other weights."""
    from safetensors.torch import load_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    return {name: t * scale if "lora_B" in name else t for name, t in tensors.items()}


def write(args, tensors, path):
    """Shards, as one rank of a trainer writes them; or a plain adapter."""
    if args.plain:
        from safetensors.torch import save_file

        path.mkdir(parents=True)
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
        shutil.copy(args.adapter / "adapter_config.json", path)
        return
    config = json.loads((args.adapter / "adapter_config.json").read_text())
    writer = lorashard.AdapterWriter(path, config, ep_size=args.ep_size)
    for name, tensor in tensors.items():
        writer.tensor(name, tensor)
    writer.commit()


def gap(one, other):
    """Mean absolute difference; a token that is not among the likeliest has at most their least."""
    return statistics.fmean(
        abs(one.get(key, min(one.values())) - other.get(key, min(other.values())))
        for key in one.keys() | other.keys()
    )


@contextmanager
def timed(row, name):
    began = time.perf_counter()
    yield
    row[name] = round(time.perf_counter() - began, 4)


def swap(args, server, row, versions):
    """One step: new weights, served under a new name and from a new path; what it answers."""
    path = versions.path(row["step"])
    with timed(row, "train_s"):
        tensors = train(args.adapter, row["scale"])
    with timed(row, "split_s"):
        write(args, tensors, path)
    published = versions.publish(row["step"])
    row |= {"load_s": round(published.load_s, 4), "unload_s": round(published.removal_s, 4)}
    with timed(row, "ask_s"):
        prompt, following = server.ask(path.name, of_prompt=True)
        # The prompts are in the prefix cache now.
        _, cached = server.ask(path.name, of_prompt=False)
    return prompt, following, cached


class PlainVersions:
    """What lorashard.Publisher does, for plain adapters on a vLLM without lorashard."""

    def __init__(self, server, directory, name, keep):
        self.server, self.directory, self.name, self.keep = server, directory, name, keep
        self.served = []

    def path(self, version):
        return self.directory / f"{self.name}-v{version:05}"

    def publish(self, version):
        row, path = {}, self.path(version)
        with timed(row, "load_s"):
            document = {"lora_name": path.name, "lora_path": str(path)}
            self.server.post("/v1/load_lora_adapter", document)
        self.served.append(path)
        with timed(row, "removal_s"):
            self.retire(self.keep)
        return SimpleNamespace(**row)

    def withdraw(self):
        self.retire(0)

    def retire(self, keep):
        while len(self.served) > keep:
            path = self.served.pop(0)
            self.server.post("/v1/unload_lora_adapter", {"lora_name": path.name})
            shutil.rmtree(path)


def versions_of(args, server):
    if args.plain:
        return PlainVersions(server, args.workdir, args.name, args.keep)
    key = os.environ.get("VLLM_API_KEY")
    return lorashard.Publisher(
        args.workdir, args.name, servers=[args.server], keep=args.keep, api_key=key
    )


def run(args, server, rows):
    """All steps; then version 0's weights once more. The answers of version 0."""
    known, versions, before = {}, versions_of(args, server), None
    for step in range(args.steps + 1):
        scale = SCALES[step % len(SCALES) if step < args.steps else 0]
        row = {"step": step, "scale": scale}
        prompt, following, cached = swap(args, server, row, versions)
        row["gap"] = round(gap(prompt, known.setdefault(scale, prompt)), 5)
        row["gap_cached"], row["right"] = round(gap(cached, following), 5), True
        if before and before[0] != scale:  # nearer to its own answers than to the last version's
            row["gap_before"] = round(gap(prompt, before[1]), 5)
            row["gap_before_cached"] = round(gap(cached, before[2]), 5)
            row["right"] = 2 * row["gap"] < row["gap_before"]
            row["right"] &= 2 * row["gap_cached"] < row["gap_before_cached"]
        before = (scale, prompt, following)
        row |= memory_of_tree(args.pid) if args.pid else {}
        row |= gpu_memory() if step % GPU_EVERY == 0 or step == args.steps else {}
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    versions.withdraw()
    return [[index, place, value] for (index, place), value in sorted(known[SCALES[0]].items())]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", required=True, metavar="URL")
    parser.add_argument("--adapter", type=Path, required=True, help="a PEFT adapter to start from")
    parser.add_argument("--ep-size", type=int, default=1)
    parser.add_argument("--plain", action="store_true", help="load it as it is, for comparison")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--keep", type=int, default=2, help="versions that stay loaded")
    parser.add_argument("--workdir", type=Path, required=True, help="seen by the server, too")
    parser.add_argument("--name", default="mine")
    parser.add_argument("--prompts", type=Path, help="JSON: texts or lists of token ids")
    parser.add_argument("--pid", type=int, help="of the server, if it is on this machine")
    parser.add_argument("--tolerance", type=float, default=0.1, help="MB of growth a step")
    args = parser.parse_args()
    args.workdir = args.workdir.absolute()
    rows, report = [], {}
    try:
        prompts = json.loads(args.prompts.read_text()) if args.prompts else PROMPTS
        server = Server(args.server, prompts)
        hits = cache_hits(args.server)
        report["answers_of_version_0"] = run(args, server, rows)
        report["version_0_again"] = {"gap": rows[-1]["gap"], "right": rows[-1]["right"]}
        report["prefix_cache_hits"] = cache_hits(args.server) - hits
    except (RuntimeError, OSError, lorashard.LorashardError) as err:
        report["failure"] = f"{type(err).__name__}: {err}"
    return finish(report, rows, args.tolerance)


def finish(report, rows, tolerance):
    """Print the report; the exit status."""
    report["wrong"] = [row["step"] for row in rows if not row["right"]]
    report |= {"steps": len(rows), "memory": flatness(rows, tolerance)} | columns(rows)
    print(json.dumps(report | {"rows": rows}, indent=1))
    return int(bool(report["wrong"]) or "failure" in report)


if __name__ == "__main__":
    sys.exit(main())
