"""vLLM without the plugin, given a shard directory: it stops with words that name lorashard.

VLLM_PLUGINS is set and leaves lorashard out, as vLLM's pages on resolvers tell users to do.
"""

from __future__ import annotations

import itertools

import pytest

from lorashard import SplitRequest, split_adapter
from tests.adapters import Spec, build
from tests.tiny import REPO
from tests.vllm_release import END_RELEASES, run_in_release

LAYOUTS = ("L1", "L2")

pytestmark = pytest.mark.parametrize("release", END_RELEASES)

# The harness's model, as its class is and as models are that rename or skip what an adapter has.
SCRIPT = """
import sys; sys.path.insert(0, REPO)
from tests.vllm_plugin import harness

def error(shards, **options):
    engine = harness.make_engine(num_experts=64, ep_size=1, **options)
    type(engine._adapter_manager.model).lora_skip_prefixes = ["mtp."]
    try:
        engine.add_adapter(harness.request(engine, shards))
    except ValueError as err:
        return str(err)
    return f"loaded {engine.list_adapters()}"

prefix = {"orig_to_new_prefix": {"": "language_model."}}
answer({
    layout: [error(shards), error(shards, wrapper="3d"), error(shards, mapper=prefix)]
    for layout, shards in SHARDS.items()
})
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A shard directory of each layout."""
    folder = tmp_path_factory.mktemp("shards")
    for layout in LAYOUTS:
        adapter = build(Spec(layout, num_experts=64, hidden=16, intermediate=8, extras=True))
        plain = adapter.write(folder / f"{layout}-plain")
        split_adapter(plain, folder / layout, SplitRequest(ep_size=8))
    return {layout: str(folder / layout) for layout in LAYOUTS}


def test_a_shard_directory_is_refused_by_a_message_that_names_lorashard(
    shards: dict[str, str], release: str
) -> None:
    messages = run_in_release(release, f"REPO, SHARDS = {str(REPO)!r}, {shards!r}\n{SCRIPT}")
    assert {layout: len(found) for layout, found in messages.items()} == dict.fromkeys(LAYOUTS, 3)
    for message in itertools.chain(*messages.values()):
        assert "install lorashard where vLLM runs" in message
        assert "VLLM_PLUGINS" in message
