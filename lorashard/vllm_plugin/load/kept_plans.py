"""The plans of the plain adapters that were loaded last, for the next adapter of the same form.

A training run saves adapters with the same names, shapes and config again and again. To read the
header and to plan takes longer than to read the weights, and comes to the same each time.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

from blake3 import blake3

from lorashard.adapter.options import LayoutOptions
from lorashard.vllm_plugin.load.plain_plan import LocalExperts, PlainPlan

_MOST_PLANS = 4
_MOST_HEADER_BYTES = 64 * 2**20  # of all plans together, which take less memory than their headers


@dataclass(frozen=True, slots=True)
class AdapterForm:
    """All that a plan depends on, but for where the experts are: the same form, the same plan.

    config, header: digests of all their bytes. file_size: of the weights.
    """

    config: bytes
    header: bytes
    header_bytes: int
    file_size: int
    options: LayoutOptions


def form_of(config: bytes, header: bytes, file_size: int, options: LayoutOptions) -> AdapterForm:
    """The form of an adapter with this config and this raw header."""
    return AdapterForm(
        blake3(config).digest(), blake3(header).digest(), len(header), file_size, options
    )


class KeptPlans:
    """A few plans, by form. Several threads may use it."""

    def __init__(self) -> None:
        self._plans: OrderedDict[AdapterForm, PlainPlan] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, form: AdapterForm, local_experts: LocalExperts) -> PlainPlan | None:
        """The plan for an adapter of this form, if it was made for the same experts."""
        with self._lock:
            plan = self._plans.get(form)
            if plan is None or not _is_for(plan, local_experts):
                return None
            self._plans.move_to_end(form)
            return plan

    def keep(self, form: AdapterForm, plan: PlainPlan) -> None:
        """Keep a plan, in place of those that were not used for longest."""
        with self._lock:
            self._plans[form] = plan
            self._plans.move_to_end(form)
            while len(self._plans) > _MOST_PLANS or self._header_bytes() > _MOST_HEADER_BYTES:
                self._plans.popitem(last=False)

    def __len__(self) -> int:
        return len(self._plans)

    def _header_bytes(self) -> int:
        return sum(form.header_bytes for form in self._plans)


def _is_for(plan: PlainPlan, local_experts: LocalExperts) -> bool:
    return all(local_experts(module) == own for module, own in plan.local_experts.items())
