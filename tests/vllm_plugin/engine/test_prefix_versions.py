"""A name's version changes with its adapter, and only then; the names kept are bounded."""

from __future__ import annotations

import pytest

from lorashard.vllm_plugin.engine import prefix_versions
from lorashard.vllm_plugin.engine.prefix_versions import PrefixVersions


def test_a_name_with_one_adapter_has_no_version_so_that_vllms_keys_stay() -> None:
    versions = PrefixVersions()
    versions.renew("other")
    assert versions.version("mine") == ""


def test_each_adapter_of_a_name_has_a_version_of_its_own() -> None:
    versions = PrefixVersions()
    seen = [versions.version("mine")]
    for _ in range(3):
        versions.renew("mine")
        seen.append(versions.version("mine"))
    versions.renew_all()
    seen.append(versions.version("mine"))
    versions.renew("mine")
    seen.append(versions.version("mine"))
    assert len(set(seen)) == len(seen)


def test_renewing_all_changes_names_that_were_never_heard_of() -> None:
    versions = PrefixVersions()
    versions.renew_all()
    assert versions.version("mine") != ""


def test_more_names_than_are_kept_change_all_versions_and_never_repeat_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefix_versions, "MAX_NAMES", 3)
    versions = PrefixVersions()
    seen: dict[str, set[str]] = {}
    for step in range(40):
        name = f"adapter {step % 5}"
        versions.renew(name)
        version = versions.version(name)
        assert version not in seen.setdefault(name, set())
        seen[name].add(version)
        assert len(versions._versions) <= 3
