"""Whether the cost of `split` grows with the adapter's bytes, and with nothing else."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tests.bench.generate import LORA_RANK, write_adapter
from tests.bench.measure import total_bytes, warm_page_cache
from tests.bench.models import MODELS, MoeModel, adapter_shapes, scale_layers
from tests.bench.rounds import Contestant, run_rounds
from tests.bench.rows import Row, Target, make_row
from tests.bench.suite import LORASHARD, Settings

LAYERS_PER_BYTE = Target(1.1, "x")
TENSORS_PER_BYTE = Target(1.2, "x")
RANKS_PER_BYTE = Target(1.1, "x")

_SCALES = (0.1, 0.3, 1.0)  # of the layers
_EP_SIZES = (2, 8, 64)

# About as many tensors as an adapter of Kimi-K2 has, and a few thousand, of the same bytes: 1.1 GB.
_MANY_TENSORS = replace(
    MODELS["kimi-k2"],
    hidden_size=128,
    expert_intermediate_size=128,
    dense_intermediate_size=128,
    attention=(),
)
_FEW_TENSORS = replace(
    MODELS["qwen3-30b-a3b"],
    num_layers=8,
    hidden_size=2880,
    expert_intermediate_size=2880,
    attention=(),
)


def bench_growth(settings: Settings) -> Iterator[Row]:
    """Rows whose ratio is that of the seconds for a byte; the smallest of each kind is the rival."""
    model = MODELS[settings.model]
    scaled = [(f"{scale:g} of the layers", scale_layers(model, scale)) for scale in _SCALES]
    yield from _compare(
        settings,
        [(name, _adapter(settings, f"layers-{each.num_layers}", each)) for name, each in scaled],
        [settings.ep_size] * len(scaled),
        LAYERS_PER_BYTE,
    )
    counted = [
        (len(adapter_shapes(each, "per_expert", LORA_RANK)), each)
        for each in (_FEW_TENSORS, _MANY_TENSORS)
    ]
    yield from _compare(
        settings,
        [(f"{n:,} tensors", _adapter(settings, f"tensors-{n}", each)) for n, each in counted],
        [settings.ep_size] * len(counted),
        TENSORS_PER_BYTE,
    )
    adapter = _adapter(settings, "ranks", scale_layers(model, _SCALES[1]))
    yield from _compare(
        settings,
        [(f"{ep_size} ranks", adapter) for ep_size in _EP_SIZES],
        _EP_SIZES,
        RANKS_PER_BYTE,
    )


def _adapter(settings: Settings, name: str, model: MoeModel) -> Path:
    return write_adapter(settings.work / f"growth-{name}", model, "per_expert")


def _compare(
    settings: Settings,
    named: Sequence[tuple[str, Path]],
    ep_sizes: Sequence[int],
    target: Target,
) -> Iterator[Row]:
    out = settings.work / "grown"

    def prepare(weights: Path) -> None:
        shutil.rmtree(out, ignore_errors=True)
        warm_page_cache([weights])

    contestants = [
        Contestant(
            f"split, {name}",
            (
                *LORASHARD,
                "split",
                str(weights.parent),
                "--ep-size",
                str(ep_size),
                "-o",
                str(out),
                "-q",
            ),
            lambda weights=weights: prepare(weights),
        )
        for (name, weights), ep_size in zip(named, ep_sizes, strict=True)
    ]
    largest = max(total_bytes([weights]) for _, weights in named)
    runs = run_rounds(contestants, settings.num_rounds, largest)
    shutil.rmtree(out)
    first = contestants[0]
    first_bytes = total_bytes([named[0][1]])
    for contestant, (_, weights) in zip(contestants, named, strict=True):
        size_bytes = total_bytes([weights])
        yield make_row(
            "per_expert",
            contestant.name,
            runs[contestant.name],
            size_bytes=size_bytes,
            rival=None if contestant is first else (first.name, runs[first.name]),
            target=None if contestant is first else target,
            bytes_of_rival=first_bytes / size_bytes,
        )
