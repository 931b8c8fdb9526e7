"""One `vllm serve` with two data-parallel engines: each answer of either against the reference.

    python -m tests.gpu.dp_server --work DIR --case NAME --out FILE [--stock] [--requests N]

FILE gets one JSON object a line, as they come.
"""

import argparse
import json
import random
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from tests.gpu.cases import CASES as REFERENCES
from tests.gpu.dp_cases import CASES, LATE, MODEL, NUM_ENGINES, DpCase, served_adapters
from tests.gpu.engine import Expected
from tests.gpu.processes import exit_after
from tests.gpu.server import Server

NUM_CLIENTS = 12
# By which a token that was generated may differ, on average, from the same token in a prompt.
DECODE_ROOM = 0.12
Report = Callable[[dict[str, Any]], None]


class _Traffic:
    """Requests to one engine in the background, so that it makes steps of its own."""

    def __init__(self, server: Server, engine: int, names: Sequence[str], prompts: Tensor) -> None:
        self._server, self._engine, self._prompts = server, engine, prompts
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(name,)) for name in names]
        self.failures: list[str] = []

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _run(self, name: str) -> None:
        number = 0
        while not self._over.is_set():
            prompt = self._prompts[number % len(self._prompts)].tolist()
            number += 1
            body = {"model": name, "prompt": prompt, "max_tokens": 16, "ignore_eos": True}
            try:
                status, text = self._server.post("/v1/completions", body, self._engine)
            except OSError as err:
                status, text = 0, repr(err)
            if status != 200:
                self.failures.append(f"{name}: {status} {text[:200]}")
                return


class Session:
    """The checks, in order."""

    def __init__(self, server: Server, expected: Expected, report: Report, *, stock: bool) -> None:
        self._server, self._expected, self._report = server, expected, report
        self._prompts = expected.prompts
        self._adapters = {"base": "base", **served_adapters(stock)}
        self._base: list[Tensor] = []

    def quiet_base(self) -> None:
        """The base model alone on each engine, before any adapter was used."""
        for engine in range(NUM_ENGINES):
            self._base.append(self._server.log_probs("base", self._prompts, engine))
            error = (self._base[-1] - self._expected.of("base")).abs().mean().item()
            self._report({"base": True, "engine": engine, "error": round(error, 4)})

    def answers(self, served: str, engine: int, what: str, adapter: str = "") -> None:
        """A model or adapter on an engine answers as the reference."""
        line: dict[str, Any] = {"check": f"{what}: {served} on {engine}"}
        name = adapter or self._adapters[served]
        try:
            got = self._server.log_probs(served, self._prompts, engine)
        except (RuntimeError, OSError) as err:
            self._report(line | {"right": False, "failure": str(err)[:300]})
            return
        if name == "base":
            error = (got - self._expected.of("base")).abs().mean().item()
            quiet = (self._base[engine] - self._expected.of("base")).abs().mean().item()
            limit = max(1.35 * quiet, quiet + 0.035)
            line |= {"error": round(error, 4), "limit": round(limit, 4), "right": error <= limit}
        else:
            line |= self._expected.judge(name, got, self._base[engine])
        self._report(line)

    def one_idle(self) -> None:
        """One engine has requests, the other none; slots in another order on each."""
        for served, engine in (
            ("a", 0), ("b", 1), ("b", 0), ("a", 1), ("c", 1), ("c", 0), ("base", 1), ("base", 0),
        ):  # fmt: skip
            self.answers(served, engine, "the other idle")

    def beside(self, other: Sequence[str], what: str) -> None:
        """Each engine in turn is asked while the other computes for others."""
        for engine in range(NUM_ENGINES):
            with _Traffic(self._server, 1 - engine, other, self._prompts) as traffic:
                for served in ("a", "base", "b", "c"):
                    self.answers(served, engine, what)
            for failure in traffic.failures[:2]:
                self._report({"check": f"{what}: traffic", "right": False, "failure": failure})

    def at_run_time(self, directory: Path, *, stock: bool) -> None:
        """An adapter is loaded, used on both engines, and unloaded, while both are busy."""
        path = directory / (LATE if stock else f"{LATE}.shards")
        with (
            _Traffic(self._server, 0, ("a",), self._prompts),
            _Traffic(self._server, 1, ("base", "b"), self._prompts),
        ):
            for number in range(2):
                late = {"lora_name": f"late{number}", "lora_path": str(path)}
                status, text = self._server.post("/v1/load_lora_adapter", late)
                self._report(
                    {"check": f"load late{number}", "right": status == 200, "body": text[:200]}
                )
                for engine in range(NUM_ENGINES):
                    self.answers(late["lora_name"], engine, "loaded at run time", LATE)
                status, text = self._server.post("/v1/unload_lora_adapter", late)
                self._report({"check": f"unload late{number}", "right": status == 200})

    def decodes(self) -> None:
        """What is generated beside others has the log-probabilities that it has in a prompt."""
        with (
            _Traffic(self._server, 0, ("a", "base"), self._prompts),
            _Traffic(self._server, 1, ("c",), self._prompts),
        ):
            generated = [
                (served, engine, place, *self._generate(served, engine, place))
                for served in self._adapters
                for engine in range(NUM_ENGINES)
                for place in range(len(self._prompts))
            ]
        apart: dict[tuple[str, int], list[float]] = {}
        for served, engine, place, tokens, values in generated:
            whole = torch.cat([self._prompts[place], torch.tensor(tokens)])[None]
            again = self._server.log_probs(served, whole, engine)[0, -len(tokens) :]
            apart.setdefault((served, engine), []).append(
                (again - torch.tensor(values)).abs().mean().item()
            )
        for (served, engine), found in apart.items():
            error = sum(found) / len(found)
            self._report(
                {
                    "check": f"decode: {served} on {engine}",
                    "apart": round(error, 4),
                    "right": error <= DECODE_ROOM,
                }
            )

    def _generate(self, served: str, engine: int, place: int) -> tuple[list[int], list[float]]:
        body = {
            "model": served, "prompt": self._prompts[place].tolist(), "max_tokens": 12,
            "temperature": 0, "ignore_eos": True, "logprobs": 1, "return_tokens_as_token_ids": True,
        }  # fmt: skip
        status, text = self._server.post("/v1/completions", body, engine)
        if status != 200:
            raise RuntimeError(f"{served}: {status} {text[:300]}")
        found = json.loads(text)["choices"][0]["logprobs"]
        tokens = [int(token.removeprefix("token_id:")) for token in found["tokens"]]
        return tokens, [float(value) for value in found["token_logprobs"]]

    def mixed(self, number: int) -> None:
        """Requests of one prompt each, for any model on any engine, several at a time."""
        chance = random.Random(0)
        jobs = [
            (
                chance.choice(list(self._adapters)),
                chance.randrange(NUM_ENGINES),
                chance.randrange(len(self._prompts)),
            )
            for _ in range(number)
        ]
        with ThreadPoolExecutor(NUM_CLIENTS) as pool:
            answers = list(pool.map(lambda job: self._one(*job), jobs))
        failures = [answer for answer in answers if isinstance(answer, str)]
        errors: dict[tuple[str, int], list[float]] = {}
        others = 0  # answers that are nearer to another adapter's reference
        for (served, engine, place), answer in zip(jobs, answers):
            if isinstance(answer, str):
                continue
            apart = {
                name: (answer - self._expected.of(adapter)[place]).abs().mean().item()
                for name, adapter in self._adapters.items()
            }
            errors.setdefault((served, engine), []).append(apart[served])
            others += min(apart, key=apart.__getitem__) != served
        quiet = max((b - self._expected.of("base")).abs().mean().item() for b in self._base)
        limit = max(1.35 * quiet, quiet + 0.035)
        groups = {
            f"{served} on {engine}": [round(sum(e) / len(e), 4), round(max(e), 4), len(e)]
            for (served, engine), e in sorted(errors.items())
        }
        wrong = [name for name, (mean, _, _) in groups.items() if mean > limit]
        self._report(
            {
                "check": f"{number} mixed requests",
                "answered": len(answers) - len(failures),
                "nearer_to_another": others,
                "limit": round(limit, 4),
                "mean_max_count": groups,
                "failures": failures[:3],
                "right": not wrong and not others and not failures,
            }
        )

    def _one(self, served: str, engine: int, place: int) -> Tensor | str:
        try:
            prompt = self._prompts[place : place + 1]
            return self._server.log_probs(served, prompt, engine)[0]
        except (RuntimeError, OSError, KeyError) as err:
            return f"{served} on {engine}: {err!r}"[:300]


def run_session(
    server: Server, case: DpCase, work: Path, report: Report, *, stock: bool, requests: int
) -> None:
    """All checks against a server that answers."""
    reference = next(c for c in REFERENCES if c.name == case.reference)
    session = Session(server, Expected.load(work, reference), report, stock=stock)
    session.quiet_base()
    session.one_idle()
    session.beside(("base",), "beside the base model")
    session.beside(("c", "base"), "beside another adapter")
    session.mixed(requests)
    if not stock:
        session.decodes()
        session.at_run_time(work / "models" / reference.model, stock=stock)
        session.one_idle()
    report({"finished": True})


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.dp_server")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--case", choices=[case.name for case in CASES], required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--stock", action="store_true")
    parser.add_argument("--requests", type=int)
    parser.add_argument("--limit", type=int, default=400, help="seconds until all of it is ended")
    args = parser.parse_args()
    case = next(case for case in CASES if case.name == args.case)

    def report(line: dict[str, Any]) -> None:
        print("RESULT", json.dumps(line), flush=True)
        with args.out.open("a") as file:
            file.write(json.dumps(line) + "\n")

    command = case.command(args.work / "models" / MODEL, stock=args.stock)
    server = Server(command, args.log, stock=args.stock)

    def stop(*_: object) -> None:
        server.end()  # then requests that wait for it fail, and their threads end
        raise RuntimeError(f"not finished within {args.limit} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(args.limit)
    try:
        report({"started": round(server.wait(), 1)})
        requests = case.requests if args.requests is None else args.requests
        run_session(server, case, args.work, report, stock=args.stock, requests=requests)
    except (RuntimeError, OSError) as err:
        report({"failure": str(err)[:1000]})
    finally:
        signal.alarm(0)
        server.end()


if __name__ == "__main__":
    exit_after(_main)
