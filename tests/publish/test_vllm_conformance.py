"""A Publisher and the answers of vLLM's own models endpoint, in several releases."""

from __future__ import annotations

import pytest

from tests.vllm_release import END_RELEASES, answers_of


@pytest.mark.parametrize("release", END_RELEASES)
def test_versions_come_and_go_in_vllms_own_list_of_models(release: str) -> None:
    found = answers_of(release, "tests.publish.vllm_models")
    zero, one, two, three = (f"policy-v{version:05}" for version in range(4))
    assert found["loads"] == [[zero, one, two, three], [zero, one, three]]
    assert found["known"] == [[one, three], [three]]
    assert found["refusal"].startswith(
        f"{two}: 1 of 2 servers did not take it: TWO: /v1/load_lora_adapter answers "
    )
    assert f"{two} does not fit" in found["refusal"]
    assert found["left"] == []
    assert found["present"] == [one, two, three]
