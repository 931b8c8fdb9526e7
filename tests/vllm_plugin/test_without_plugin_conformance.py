"""vLLM without the plugin, given a shard directory: it stops with words that name lorashard.

VLLM_PLUGINS is set and leaves lorashard out, as vLLM's pages on resolvers tell users to do.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from lorashard import SplitRequest, split_adapter
from tests.adapters import Spec, build
from tests.tiny import REPO
from tests.vllm_release import PLUGIN_RELEASES, run_in_release

pytestmark = pytest.mark.parametrize("release", PLUGIN_RELEASES)

# The harness's model, as its class is and as models are that rename or skip what an adapter has.
SCRIPT = """
import sys; sys.path.insert(0, REPO)
from tests.vllm_plugin import harness

def error(**options):
    engine = harness.make_engine(num_experts=64, ep_size=1, **options)
    type(engine._adapter_manager.model).lora_skip_prefixes = ["mtp."]
    try:
        engine.add_adapter(harness.request(engine, SHARDS))
    except ValueError as err:
        return str(err)
    return f"loaded {engine.list_adapters()}"

prefix = {"orig_to_new_prefix": {"": "language_model."}}
answer([error(), error(wrapper="3d"), error(mapper=prefix)])
"""


@pytest.mark.parametrize("layout", ["L1", "L2"])
def test_a_shard_directory_is_refused_by_a_message_that_names_lorashard(
    tmp_path: Path, release: str, layout: str
) -> None:
    adapter = build(Spec(layout, num_experts=64, hidden=16, intermediate=8, extras=True))
    split_adapter(adapter.write(tmp_path / "adapter"), tmp_path / "shards", SplitRequest(ep_size=8))
    values = f"REPO, SHARDS = {str(REPO)!r}, {str(tmp_path / 'shards')!r}\n"
    for message in run_in_release(release, values + SCRIPT):
        assert "pip install lorashard" in message
        assert "VLLM_PLUGINS" in message
