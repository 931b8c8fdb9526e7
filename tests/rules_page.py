"""docs/rules.md: what is known to go wrong unnoticed, from the table in lorashard/rules.py.

Which test tries each rule is here, since the tests are no part of the package.
"""

from __future__ import annotations

from lorashard.rules import RULES, Rule
from lorashard.vllm_plugin.engine import guards
from lorashard.vllm_plugin.patches.table import PATCHES

_CONFORMANCE = "tests/vllm_plugin"
_GUARDS = f"{_CONFORMANCE}/engine/test_guards.py::test_each_rule_stands_alone"
# The id of each rule -> the test of what detects or mends it.
TESTS = {
    "uneven-experts": f"{_CONFORMANCE}/test_loading_conformance.py::test_every_layout_on_every_rank",
    "other-placement": f"{_CONFORMANCE}/load/test_advice.py::test_the_files_that_were_needed_are_named",
    "eplb-rebalance": f"{_CONFORMANCE}/test_rebalancing_conformance.py::test_every_slot_holds_the_lora_of_its_expert_on_two_ranks",
    "data-parallel-slots": f"{_CONFORMANCE}/test_data_parallel_conformance.py::test_two_engines_agree",
    "unknown-vllm": f"{_CONFORMANCE}/engine/test_guards.py::test_broken_contracts_are_refused_without_expert_parallelism_too",
    "patched-by-others": f"{_CONFORMANCE}/test_beside_conformance.py::test_no_load_is_wrong",
    "ignored-expert-lora": f"{_CONFORMANCE}/engine/test_facts.py::test_one_layer_that_ignores_lora_is_enough",
    "router-weight-on-input": f"{_CONFORMANCE}/engine/test_facts.py::test_one_layer_that_weighs_inputs_is_enough",
    "weights-of-another-kernel": f"{_CONFORMANCE}/engine/test_facts.py::test_weights_laid_out_for_a_kernel_that_lora_does_not_use",
    "stale-remote-rows": f"{_CONFORMANCE}/engine/test_facts.py::test_unfused_gpt_oss_experts_without_a_masked_sum_leave_rows",
    "fp8-activations": f"{_CONFORMANCE}/patches/test_activations.py::test_releases_from_0_20_to_0_23_need_it",
    "local-expert-ids": f"{_CONFORMANCE}/patches/test_punica.py::test_releases_to_0_20_2_translate_ids_that_nothing_has_written",
    "earlier-adapters-deltas": f"{_CONFORMANCE}/test_layers_conformance.py::test_nothing_is_wrong",
    "unloaded-by-name-only": f"{_CONFORMANCE}/patches/test_unloading.py::test_an_adapter_that_nobody_uses_leaves_every_rank_at_once",
    "stale-prefix-cache": f"{_CONFORMANCE}/patches/test_unloading.py::test_an_adapter_under_the_name_of_another_gets_nothing_that_the_other_has_cached",
    "ranks-differ": f"{_CONFORMANCE}/test_load_faults_conformance.py::test_a_fault_on_one_rank_is_the_same_on_both_and_the_next_load_works",
    "answers-left-behind": f"{_CONFORMANCE}/test_swapped_adapters_conformance.py::test_after_a_refusal_the_next_call_gets_its_own_answers",
    "versions-of-a-name": f"{_CONFORMANCE}/test_swapped_adapters_conformance.py::test_a_step_activates_both_versions_of_a_name",
    "replaced-while-read": f"{_CONFORMANCE}/test_many_loads_conformance.py::test_every_slot_is_right_whatever_was_tried_before",
    "unknown-module-names": f"{_CONFORMANCE}/load/test_matching.py::test_a_container_that_no_layer_takes",
    "rank-and-alpha-patterns": "tests/adapter/test_name_patterns.py::test_patterns_mean_what_peft_means",
    "untrained-experts": "tests/inspect/test_findings.py::test_untrained_experts_and_smaller_r_are_named",
    "experts-of-another-r": "tests/publish/test_writer.py::test_experts_of_a_smaller_r_are_padded_as_split_does",
    "order-of-fused-columns": "tests/adapter/test_config.py::test_a_known_lora_b_layout_is_read",
    "orientation-of-fused-factors": "tests/adapter/test_fused_pairs.py::test_a_forced_orientation_that_does_not_fit_is_refused",
    "base-weights-changed": "tests/adapter/test_config.py::test_a_feature_without_a_meaning_in_shards_is_refused",
    "unsupported-variants": "tests/adapter/test_config.py::test_a_feature_without_a_meaning_in_shards_is_refused",
    "lost-in-a-cast": "tests/split/test_cast_notes.py::test_values_that_become_zero_are_counted",
    "damaged-bytes": f"{_CONFORMANCE}/load/test_shard_source.py::test_flipped_bits_are_found_where_every_byte_is_verified",
}  # fmt: skip

INTRO = """\
# Rules: what goes wrong unnoticed, and what lorashard does about it

Each row is something known to give wrong answers, or none, without an error. The id is stable: the first line of an error that is
raised because of it, in a command, a server's answer or Python, ends in `(rule ID)`, and `--json` has it as `rule`, in errors, in the
result of `verify`, and in the `refusals` of `doctor`. "Seen by" says where lorashard notices it: a command, vLLM's start, or the load
of an adapter. A refusal at the start can be overridden by the variable that is named, which says what is risked. [releases.md](releases.md) has what was
run, [messages.md](messages.md) the messages.

| id | without lorashard | with it | seen by | upstream | test |
|---|---|---|---|---|---|
"""


def make_page(notice: str) -> str:
    """The page, in the order of the table."""
    return f"{notice}\n{INTRO}{''.join(map(_row, RULES))}"


def variable_of(rule: Rule) -> str | None:
    """The variable that overrides the refusal against it."""
    return next((guard.variable for guard in guards.RULES if guard.hazard == rule), None)


def patches_of(rule: Rule) -> list[str]:
    """What in vLLM is patched against it."""
    return [patch.target for patch in PATCHES if patch.hazard == rule]


def _row(rule: Rule) -> str:
    answer = rule.answer
    if variable := variable_of(rule):
        answer += f" `{variable}`"
    file, name = TESTS[rule.id].split("::")
    upstream = f"[{_short(rule.upstream)}]({rule.upstream})" if rule.upstream else "–"
    cells = (
        f'<a id="{rule.id}"></a>`{rule.id}`', rule.hazard, answer, ", ".join(rule.seen), upstream,
        f"[{name.removeprefix('test_').replace('_', ' ')}](../{file})",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |\n"


def _short(url: str) -> str:
    """What a link to GitHub is called: an issue's number, or the file."""
    parts = url.removeprefix("https://github.com/").partition("#")[0].split("/")
    return (
        f"{parts[1]} {parts[3]}" if parts[2] in ("issues", "pull") else f"{parts[1]}: {parts[-1]}"
    )
