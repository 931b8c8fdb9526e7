"""Does `pip install lorashard` beside a vLLM release change any package that is there?

`python -m tests.resolve_releases 0.33.0 0.20.2` asks uv (`pip install --group resolve`) to resolve
each release for Linux x86_64, and then the same and this checkout's dependencies with exactly these
versions; without arguments it takes all supported releases and minutes. uv reads metadata of wheels
only: nothing is installed, and no package's code runs. Two environments are tried:

    today        the newest versions that vLLM allows today
    release day  the newest versions that there were a day after the release

Exit code 1 if a package would change, or if one of the resolutions fails.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# Release -> a day after its wheel was uploaded.
RELEASES = {
    "0.16.0": "2026-02-27",
    "0.17.1": "2026-03-12",
    "0.18.1": "2026-04-01",
    "0.19.1": "2026-04-19",
    "0.20.2": "2026-05-11",
    "0.21.0": "2026-05-16",
    "0.22.1": "2026-06-06",
    "0.23.0": "2026-06-14",
    "0.24.0": "2026-07-01",
    "0.25.1": "2026-07-15",
    "0.26.0": "2026-07-26",
    "0.27.1": "2026-08-12",
    "0.28.0": "2026-08-27",
    "0.29.0": "2026-09-10",
    "0.30.0": "2026-09-23",
    "0.31.0": "2026-10-06",
    "0.32.0": "2026-10-19",
    "0.33.0": "2026-11-03",
}
CHECKOUT = str(Path(__file__).resolve().parents[1] / "pyproject.toml")  # all that uv needs of it
UV = (
    sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate",
    "--only-binary=:all:",  # no setup.py runs
    "--python-version=3.12", "--python-platform=x86_64-manylinux_2_35",  # vLLM 0.20.2 needs 2_35
)  # fmt: skip

Pins = dict[str, str]  # name -> version


class UnresolvableError(Exception):
    """What uv says, in one line."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What `pip install lorashard` does to one environment."""

    release: str
    environment: str
    present: Pins  # lorashard's dependencies as vLLM brings them
    adds: Pins
    changes: Pins  # name -> "before -> after"
    error: str | None = None

    def line(self) -> str:
        adds, changes = (
            ", ".join(map(" ".join, pins.items())) or "nothing"
            for pins in (self.adds, self.changes)
        )
        said = f"adds {adds}; changes {changes}" if self.changes or not self.error else self.error
        return f"{self.release:<8}{self.environment:<12}{said}"


def resolve(
    *requirements: str, options: Sequence[str] = (), beside: Pins | None = None, exact: bool = False
) -> Pins:
    """All that the requirements bring. Raises UnresolvableError.

    Versions in `beside` are kept where the requirements allow it; `exact` makes that a condition.
    """
    with tempfile.TemporaryDirectory() as name:
        wanted, pins, found = (Path(name) / file for file in ("wanted.in", "pins.txt", "found.txt"))
        wanted.write_text("\n".join(requirements))
        pins.write_text("\n".join(map("==".join, (beside or {}).items())))
        found.write_bytes(pins.read_bytes())  # uv prefers what its output file says already
        bounds = [f"--constraint={pins}"] if exact else []
        command = [*UV, *options, *bounds, f"--output-file={found}", str(wanted)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise UnresolvableError(" ".join(ended.stderr.split()))
        return dict(line.split("==") for line in found.read_text().splitlines())


def install_beside(
    release: str, environment: str, before: Pins, own: Sequence[str], options: Sequence[str]
) -> Outcome:
    """Add this checkout to the packages `before`. Raises UnresolvableError if nothing fits."""
    vllm, error = f"vllm=={release}", None
    try:
        after = resolve(vllm, options=[CHECKOUT, *options], beside=before, exact=True)
    except UnresolvableError as err:
        error = f"does not fit: {err}"
        after = resolve(
            vllm, options=[CHECKOUT, *options], beside=before
        )  # to name what must change
    present = {name: before[name] for name in own if name in before}
    adds = {name: after[name] for name in after if name not in before}
    lost = {name: after.get(name, "gone") for name in before if after.get(name) != before[name]}
    changes = {name: f"{before[name]} -> {version}" for name, version in lost.items()}
    return Outcome(release, environment, present, adds, changes, error)


def try_release(release: str, own: Sequence[str]) -> Iterator[Outcome]:
    """Both environments; `own` names lorashard's dependencies."""
    vllm = f"vllm=={release}"
    cut_off = [f"--exclude-newer={RELEASES[release]}"] if release in RELEASES else []
    for environment, options in (("today", []), ("release day", cut_off)):
        try:
            before = resolve(vllm, options=options)
            yield install_beside(release, environment, before, own, options)
        except UnresolvableError as err:
            yield Outcome(release, environment, {}, {}, {}, f"does not resolve: {err}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("releases", nargs="*", metavar="RELEASE", default=tuple(RELEASES))
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    args = parser.parse_args()
    own = tuple(resolve(options=[CHECKOUT, "--no-deps"]))
    outcomes = []
    for release in args.releases:
        for outcome in try_release(release, own):
            outcomes.append(outcome)
            if not args.json:
                print(outcome.line(), flush=True)
    if args.json:
        print(json.dumps([asdict(outcome) for outcome in outcomes], indent=2))
    sys.exit(any(outcome.error or outcome.changes for outcome in outcomes))


if __name__ == "__main__":
    main()
