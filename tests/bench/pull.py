"""`pull` of one rank against huggingface_hub downloading everything, from a Hub on loopback.

Loopback is not a network. It is measured at full speed, where this machine's processors are the limit,
and with a network's bandwidth, shared by all connections, with and without a delay before each
answer.
"""

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from lorashard.adapter.config import CONFIG_NAME
from lorashard.shards.names import MANIFEST_NAME, REPLICATED_NAME, rank_file_name
from tests.bench.generate import write_adapter
from tests.bench.measure import run_command, warm_page_cache
from tests.bench.models import MODELS, scale_layers
from tests.bench.rounds import Contestant, run_rounds
from tests.bench.rows import Row, make_row
from tests.bench.suite import LORASHARD, Settings
from tests.hub_server import HubServer

# Fraction of the other parts' layers: enough to make start-up small, and done in two minutes.
PART = 0.15


@dataclass(frozen=True, slots=True)
class Network:
    """How the server answers. bandwidth: bytes per second, None for as fast as it goes."""

    name: str
    bandwidth: float | None
    delay_s: float  # before each answer


NETWORKS = (
    Network("1 Gbit/s", 125e6, 0),
    Network("1 Gbit/s, 50 ms", 125e6, 0.05),
    Network("loopback", None, 0),
)

_REPO = "owner/shards"
_DOWNLOAD = """
import sys
from huggingface_hub import snapshot_download
snapshot_download(sys.argv[1], allow_patterns=sys.argv[2:] or None)
"""


class UnexpectedBytesError(Exception):
    """The rounds did not move the same bytes, so their times cannot be compared."""


def bench_pull(settings: Settings) -> Iterator[Row]:
    """Measure with each bandwidth. The shards are those of a per-expert adapter."""
    model = scale_layers(MODELS[settings.model], settings.scale * PART)
    adapter = settings.work / f"{settings.model}-{model.num_layers}-layers-per_expert"
    print(f"pull: using {adapter}, writing it if it is not there", file=sys.stderr)
    write_adapter(adapter, model, "per_expert")
    shards = settings.work / "shards"
    shutil.rmtree(shards, ignore_errors=True)
    ep_size = ("--ep-size", str(settings.ep_size))
    run_command((*LORASHARD, "split", str(adapter), *ep_size, "-o", str(shards), "-q"))
    files = {path.name: path for path in shards.iterdir()}
    with HubServer() as hub:
        hub.add_repo(_REPO, files)
        for network in NETWORKS:
            hub.mend()
            hub.delay("", network.delay_s)
            hub.limit_bandwidth(network.bandwidth)
            warm_page_cache(files.values())
            yield from _bench(settings, hub, network.name)
    shutil.rmtree(shards)


def _bench(settings: Settings, hub: HubServer, network: str) -> Iterator[Row]:
    outputs = settings.work / "outputs"
    environment = hub.environment(outputs / "home")  # the cache of an earlier round is deleted

    def delete_outputs() -> None:
        shutil.rmtree(outputs, ignore_errors=True)
        outputs.mkdir()

    def contestant(name: str, *command: str) -> Contestant:
        return Contestant(f"{name} ({network})", command, delete_outputs, environment)

    download = (sys.executable, "-c", _DOWNLOAD, _REPO)
    of_rank = (CONFIG_NAME, MANIFEST_NAME, REPLICATED_NAME, rank_file_name(0, settings.ep_size))
    everything = contestant("snapshot_download", *download)
    same_files = contestant("snapshot_download of the rank's files", *download, *of_rank)
    pull = contestant(
        "pull", *LORASHARD, "pull", f"hf://{_REPO}", "--ep-rank", "0", "-q",
        "-o", str(outputs / "pulled"),
    )  # fmt: skip
    contestants = (everything, pull, same_files)

    moved: dict[str, int] = {}
    for untimed in contestants:
        untimed.prepare()
        hub.clear()
        run_command(untimed.command, environment)
        moved[untimed.name] = _sent_bytes(hub)
    hub.clear()
    runs = run_rounds(contestants, settings.num_rounds)
    shutil.rmtree(outputs)
    if _sent_bytes(hub) != settings.num_rounds * sum(moved.values()):
        raise UnexpectedBytesError

    for rival in (everything, same_files):
        yield make_row("", rival.name, runs[rival.name], size_bytes=moved[rival.name])
    for rival in (everything, same_files):
        yield make_row(
            "",
            pull.name,
            runs[pull.name],
            size_bytes=moved[pull.name],
            rival=(rival.name.rpartition(" (")[0], runs[rival.name]),
            size_ratio=moved[pull.name] / moved[rival.name],
        )


def _sent_bytes(hub: HubServer) -> int:
    """All that the server sent, listings and redirects too, by its own log."""
    return sum(request.sent_bytes for request in hub.requests)
