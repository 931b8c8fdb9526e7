"""The adapter_model.safetensors of a shard directory says what the directory is, to anyone."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from blake3 import blake3
from safetensors import safe_open

from lorashard import SplitRequest, push_shards, split_adapter, verify_shards
from lorashard.adapter.notice import NOTICE, NOTICE_TENSOR, NOTICES, is_notice, may_be_notice
from lorashard.adapter.read import read_adapter
from lorashard.errors import AdapterError
from lorashard.storage.remote import locate
from tests.tiny import save_adapter, save_config

# Every directory of format version 1 that has the file has the bytes of one of these.
DIGEST = "487feabb0e90fb2a8b324b0f3a8cd93df12be47310ba969455b0e8da40823229"
EARLIER = "2ca6b47302dbe83cd078063e46afff6caecd64a6232a6b0d9b27281e178c9a09"


def test_the_notice_never_changes() -> None:
    assert blake3(NOTICE).hexdigest() == DIGEST
    assert [blake3(notice).hexdigest() for notice in NOTICES] == [DIGEST, EARLIER]


def test_any_reader_of_safetensors_can_read_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(NOTICE)
    with safe_open(tmp_path / "file", framework="pt") as opened:
        assert list(opened.keys()) == [NOTICE_TENSOR]
        assert opened.get_tensor(NOTICE_TENSOR).tolist() == [[0.0]]


def test_its_name_is_one_module_to_vllm_that_says_what_to_do() -> None:
    module = NOTICE_TENSOR.removesuffix(".lora_A.weight")
    assert module != NOTICE_TENSOR
    assert "." not in module
    assert not any(word in module for word in ("experts", "base_layer", "mtp", "_proj", "model"))
    for words in (
        "lorashard shard directory",
        "(install lorashard where vLLM runs",
        "VLLM_PLUGINS",
    ):
        assert words in module


@pytest.mark.parametrize("notice", NOTICES)
@pytest.mark.parametrize("remote", [False, True])
def test_what_has_only_the_notice_is_no_adapter(
    tmp_path: Path, remote: bool, notice: bytes
) -> None:
    save_config(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(notice)
    place = locate(tmp_path.as_uri()) if remote else tmp_path
    with pytest.raises(AdapterError, match="holds shards, not an adapter") as caught:
        read_adapter(place)
    assert "`lorashard reshard` places shards anew" in str(caught.value.hint)


def test_no_other_file_is_the_notice(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert not is_notice(path)
    path.mkdir()
    assert not is_notice(path)
    path.rmdir()
    for wrong in (b"", NOTICE[:-1], NOTICE[:-1] + b"\1", NOTICE + b"\0"):
        path.write_bytes(wrong)
        assert not is_notice(path)
    for notice in NOTICES:
        path.write_bytes(notice)
        assert is_notice(path)
        assert may_be_notice(path.stat().st_size)


def test_a_directory_with_the_earlier_notice_is_right_and_may_be_replaced(tmp_path: Path) -> None:
    adapter, out = save_adapter(tmp_path / "adapter"), tmp_path / "out"
    split_adapter(adapter, out, SplitRequest(ep_size=2))
    (out / "adapter_model.safetensors").write_bytes(NOTICES[1])
    assert verify_shards(out) == ()
    push_shards(out, (tmp_path / "there").as_uri())
    (tmp_path / "there" / "adapter_model.safetensors").write_bytes(NOTICES[1])
    push_shards(out, (tmp_path / "there").as_uri(), force=True)
    split_adapter(adapter, out, SplitRequest(ep_size=2), force=True)
    for directory in (out, tmp_path / "there"):
        assert (directory / "adapter_model.safetensors").read_bytes() == NOTICE


def test_peft_says_that_a_shard_directory_lacks_the_adapters_tensors(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    adapter = save_adapter(tmp_path / "adapter", target_modules=["q_proj"])
    split_adapter(adapter, tmp_path / "shards", SplitRequest(ep_size=2))
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            hidden_size=8, intermediate_size=6, moe_intermediate_size=6, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, head_dim=4, num_experts=4,
            num_experts_per_tok=2, vocab_size=16,
        )
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(model, tmp_path / "shards")
    assert any("missing adapter keys" in str(warning.message) for warning in caught)
