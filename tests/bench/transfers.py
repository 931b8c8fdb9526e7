"""Our own code against libraries that move the same bytes: from the Hub, from S3 and HTTP, from disk.

    python -m tests.bench.transfers --work /data/bench

Each contestant brings the files that one rank needs, in the process of the benchmark, in alternating
rounds; what a line says is the median of its time and of its ratio to ours in the same round. The
server is `file_server`: processes of its own in which the kernel copies (a Hub's small answers come
from the tests' server, in another process). obstore and fastsafetensors are measured if they can be
imported.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from tests.bench.generate import write_adapter
from tests.bench.machine import describe_machine
from tests.bench.measure import run_command, warm_page_cache
from tests.bench.models import MODELS, scale_layers
from tests.bench.suite import LORASHARD
from tests.bench.transfers_hub import bench_hub
from tests.bench.transfers_memory import bench_memory
from tests.bench.transfers_stores import bench_stores

_MODEL, _EP_SIZE = "glm-4.5-air", 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=0.3, help="fraction of the model's layers")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--work", type=Path, help="the adapter is kept there for the next run")
    parser.add_argument("--only", choices=("hub", "stores", "memory"))
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="lorashard-bench-"))
    try:
        model = scale_layers(MODELS[_MODEL], args.scale)
        adapter = work / f"{_MODEL}-{model.num_layers}-layers-per_expert"
        write_adapter(adapter, model, "per_expert")
        shards, outputs = work / "transfer-shards", work / "outputs"
        split = (*LORASHARD, "split", str(adapter), "--ep-size", str(_EP_SIZE), "--force", "-q")
        run_command((*split, "-o", str(shards)))
        names = (
            "adapter_config.json", "lorashard.json", "replicated.safetensors",
            f"ep-00000-of-{_EP_SIZE:05d}.safetensors",
        )  # fmt: skip
        size_bytes = sum((shards / name).stat().st_size for name in names)
        print(f"{size_bytes / 1e6:.0f} MB of one rank of {_EP_SIZE}")
        print(", ".join(f"{key} {value}" for key, value in describe_machine().items()))
        warm_page_cache(shards.iterdir())
        if args.only in (None, "memory"):
            bench_memory(shards, names, args.rounds)
        if args.only in (None, "hub"):
            bench_hub(shards, outputs, names, args.rounds)
        if args.only in (None, "stores"):
            bench_stores(shards, outputs, names, args.rounds)
        shutil.rmtree(outputs, ignore_errors=True)
    finally:
        if args.work is None:
            shutil.rmtree(work)


if __name__ == "__main__":
    main()
