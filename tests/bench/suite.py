"""What is measured: each lorashard command against a plain tool that does the same I/O.

Every command runs on this machine's disk and page cache in the same session as its
rival, in memory that has been used right before.
"""

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench.generate import write_adapter
from tests.bench.machine import is_in_memory
from tests.bench.measure import (
    Run,
    drop_from_page_cache,
    run_command,
    total_bytes,
    warm_page_cache,
)
from tests.bench.models import FORMS, MODELS, Form, scale_layers
from tests.bench.rounds import Contestant, run_rounds
from tests.bench.rows import Row, Target, make_row

LORASHARD = (sys.executable, "-m", "lorashard")

# `split` reads, hashes, writes and fsyncs. `cp` returns while the data is still in memory; with a
# sync it does what split does, without the two digests, which the next rival adds. A fused lora_B
# is transposed as well. `split --no-sync` returns when `cp` does.
# In a file system in memory nothing has to be synced, and `cp` alone is the rival.
SPLIT_VS_CP = {"per_expert": Target(1.5, "x"), "fused": Target(2.0, "x")}
SPLIT_VS_CP_SYNC = {"per_expert": Target(1.05, "x"), "fused": Target(1.2, "x")}
REWRITE_VS_CP_SYNC = {"per_expert": Target(1.3, "x"), "fused": Target(1.5, "x")}
# A disk should hide the cost of hashing.
VERIFY_COLD_VS_CAT = Target(1.25, "x")
# `verify` digests the shards, and the source that they hold; its rival the files of both.
VERIFY_WARM_VS_BLAKE3 = Target(1.3, "x")
AGAINST_WARM_VS_BLAKE3 = Target(4.0, "x")
INSPECT_SECONDS = Target(0.5, "s")
HELP_SECONDS = Target(0.15, "s")

_NUM_HELP_RUNS = 7

_HASH_FILES = """
import sys
from blake3 import blake3
for path in sys.argv[1:]:
    blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()
"""


@dataclass(frozen=True, slots=True)
class Settings:
    """How big, how often and where."""

    model: str
    scale: float  # part of the model's layers
    ep_size: int
    num_rounds: int
    work: Path


def _no_preparation() -> None:
    pass


def _cp_and_sync(weights: Path, copy: Path, prepare: Callable[[], None]) -> Contestant:
    command = 'cp "$1" "$2" && sync --data "$2"'
    return Contestant("cp + sync", ("sh", "-c", command, "sh", str(weights), str(copy)), prepare)


def _cp_digests_and_sync(weights: Path, copy: Path, prepare: Callable[[], None]) -> Contestant:
    """What `split` does with plain tools: a copy, and the digests of both sides."""
    command = 'cp "$1" "$2" && "$3" -c "$4" "$1" "$2" && sync --data "$2"'
    arguments = (str(weights), str(copy), sys.executable, _HASH_FILES)
    return Contestant(
        "cp + blake3 of both + sync", ("sh", "-c", command, "sh", *arguments), prepare
    )


def _against_rivals(
    form: Form,
    contestant: Contestant,
    runs: Mapping[str, tuple[Run, ...]],
    size_bytes: int,
    *rivals: tuple[Contestant, Target | None],
) -> Iterator[Row]:
    for rival, target in rivals:
        yield make_row(
            form,
            contestant.name,
            runs[contestant.name],
            size_bytes=size_bytes,
            rival=(rival.name, runs[rival.name]),
            target=target,
        )


def _bench_split(settings: Settings, form: Form, adapter: Path, weights: Path) -> Iterator[Row]:
    """Compare `split` with copies of the weights, all read from a warm page cache."""
    outputs = settings.work / "outputs"
    copy, shards, naive = outputs / "copy", outputs / "shards", outputs / "naive"

    def delete_outputs() -> None:
        shutil.rmtree(outputs, ignore_errors=True)
        outputs.mkdir()

    ep_size = ("--ep-size", str(settings.ep_size))
    cp = Contestant("cp", ("cp", str(weights), str(copy)), delete_outputs)
    cp_sync = _cp_and_sync(weights, copy, delete_outputs)
    cp_digests_sync = _cp_digests_and_sync(weights, copy, delete_outputs)
    obvious = Contestant(
        "naive script",
        (sys.executable, "-m", "tests.bench.naive", str(adapter), str(naive), *ep_size),
        delete_outputs,
    )
    split = Contestant(
        "split",
        (*LORASHARD, "split", str(adapter), *ep_size, "-o", str(shards), "-q"),
        delete_outputs,
    )
    no_sync = Contestant("split --no-sync", (*split.command, "--no-sync"), delete_outputs)

    size_bytes = total_bytes([weights])
    warm_page_cache([weights])
    runs = run_rounds(
        (cp, cp_sync, cp_digests_sync, split, no_sync, obvious), settings.num_rounds, size_bytes
    )
    shutil.rmtree(outputs)

    for rival in (cp, cp_sync, cp_digests_sync, obvious):
        yield make_row(form, rival.name, runs[rival.name], size_bytes=size_bytes)
    in_memory = is_in_memory(settings.work)
    yield from _against_rivals(
        form,
        split,
        runs,
        size_bytes,
        (cp, None),
        (cp_sync, None if in_memory else SPLIT_VS_CP_SYNC[form]),
        (cp_digests_sync, None),
        (obvious, None),
    )
    yield from _against_rivals(
        form, no_sync, runs, size_bytes, (cp, SPLIT_VS_CP[form] if in_memory else None)
    )


@contextmanager
def _shards_of(settings: Settings, adapter: Path) -> Iterator[Path]:
    shards = settings.work / "shards"
    shutil.rmtree(shards, ignore_errors=True)
    ep_size = ("--ep-size", str(settings.ep_size))
    run_command((*LORASHARD, "split", str(adapter), *ep_size, "-o", str(shards), "-q"))
    try:
        yield shards
    finally:
        shutil.rmtree(shards)


def _bench_rewrites(settings: Settings, form: Form, shards: Path, weights: Path) -> Iterator[Row]:
    """Compare the commands that read shards and write them anew with a copy of the weights."""
    out = settings.work / "rewritten"

    def delete_output() -> None:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()

    cp_sync = _cp_and_sync(weights, out / "copy", delete_output)
    ep_size = ("--ep-size", str(max(1, settings.ep_size // 2)))
    rewrites = [
        Contestant(
            name, (*LORASHARD, *command, str(shards), "-o", str(out / "new"), "-q"), delete_output
        )
        for name, command in (
            ("merge", ("merge",)),
            (f"reshard {' '.join(ep_size)}", ("reshard", *ep_size)),
            *((f"convert --layout {each}", ("convert", "--layout", each)) for each in FORMS),
        )
    ]
    size_bytes = total_bytes([weights])
    runs = run_rounds((cp_sync, *rewrites), settings.num_rounds, size_bytes)
    shutil.rmtree(out)
    yield make_row(form, cp_sync.name, runs[cp_sync.name], size_bytes=size_bytes)
    for rewrite in rewrites:
        yield from _against_rivals(
            form, rewrite, runs, size_bytes, (cp_sync, REWRITE_VS_CP_SYNC[form])
        )


def _bench_verify(
    settings: Settings, form: Form, adapter: Path, shards: Path, weights: Path
) -> Iterator[Row]:
    """Compare `verify` with reading the same files, from disk and from memory."""
    files = sorted(path for path in shards.rglob("*") if path.is_file())
    size_bytes = total_bytes(files)
    names = tuple(str(path) for path in files)

    def drop_files() -> None:
        drop_from_page_cache(files)

    def warm_files() -> None:
        warm_page_cache((*files, weights))

    command = (*LORASHARD, "verify", str(shards), "-q")
    cat = Contestant("cat (cold)", ("cat", *names), drop_files)
    verify = Contestant("verify (cold)", command, drop_files)
    runs = run_rounds((cat, verify), settings.num_rounds)
    yield make_row(form, cat.name, runs[cat.name], size_bytes=size_bytes)
    yield from _against_rivals(form, verify, runs, size_bytes, (cat, VERIFY_COLD_VS_CAT))

    cat = Contestant("cat (warm)", ("cat", *names), warm_files)
    hash_files = (sys.executable, "-c", _HASH_FILES, *names)
    blake3 = Contestant("blake3 of the shards", hash_files, warm_files)
    of_both = Contestant("blake3 of shards and source", (*hash_files, str(weights)), warm_files)
    verify = Contestant("verify (warm)", command, warm_files)
    against = Contestant(
        "verify --against (warm)", (*command, "--against", str(adapter)), warm_files
    )
    runs = run_rounds((cat, blake3, of_both, verify, against), settings.num_rounds)
    for rival in (cat, blake3, of_both):
        yield make_row(form, rival.name, runs[rival.name], size_bytes=size_bytes)
    rivals = ((cat, None), (blake3, None), (of_both, VERIFY_WARM_VS_BLAKE3))
    yield from _against_rivals(form, verify, runs, size_bytes, *rivals)
    yield from _against_rivals(form, against, runs, size_bytes, (blake3, AGAINST_WARM_VS_BLAKE3))


def _bench_inspect(settings: Settings, form: Form, adapter: Path) -> Iterator[Row]:
    command = (*LORASHARD, "inspect", str(adapter), "--json")
    inspect = Contestant("inspect --json", command, _no_preparation)
    runs = run_rounds((inspect,), settings.num_rounds)
    yield make_row(form, inspect.name, runs[inspect.name], target=INSPECT_SECONDS)


def bench_form(settings: Settings, form: Form) -> Iterator[Row]:
    """Measure every command that reads an adapter, on one adapter of this form."""
    model = scale_layers(MODELS[settings.model], settings.scale)
    adapter = settings.work / f"{settings.model}-{model.num_layers}-layers-{form}"
    print(f"{form}: using {adapter}, writing it if it is not there", file=sys.stderr)
    weights = write_adapter(adapter, model, form)
    yield from _bench_split(settings, form, adapter, weights)
    with _shards_of(settings, adapter) as shards:
        yield from _bench_verify(settings, form, adapter, shards, weights)
        yield from _bench_rewrites(settings, form, shards, weights)
    yield from _bench_inspect(settings, form, adapter)


def bench_help() -> Iterator[Row]:
    """Measure the start-up time: what every command costs before it does anything."""
    bare = Contestant("python -c pass", (sys.executable, "-c", "pass"), _no_preparation)
    help_text = Contestant("--help", (*LORASHARD, "--help"), _no_preparation)
    runs = run_rounds((bare, help_text), _NUM_HELP_RUNS)
    yield make_row("", bare.name, runs[bare.name])
    yield make_row(
        "",
        help_text.name,
        runs[help_text.name],
        rival=(bare.name, runs[bare.name]),
        target=HELP_SECONDS,
    )
