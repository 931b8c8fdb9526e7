"""How the writer of an adapter stored the factors of one experts container. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lorashard.adapter.options import LoraBLayout, Orientation

# The layout numbers are those of docs/adapter-layouts.md.
#   per_expert  one tensor for each expert                           L1, L15
#   stacked     experts along dim 0, or one factor that all share    L8, L10 to L12, L14
#   native      NeMo AutoModel's own orientation                     L13
#   fused       PEFT's wrapped parameters                            L2 to L7, L16
Storage = Literal["per_expert", "stacked", "native", "fused"]


@dataclass(frozen=True, slots=True)
class SourceLayout:
    """The layout of one container in the source file; `str()` is its name in the manifest.

    storages: the kinds of tensors that its factors are in; L9 has two. In the order of `Storage`.
    orientation, lora_b_layout: of the fused tensors, if there are any.
    up_without_gate: whether the fused tensors are up_proj and down_proj, without a gate.
    """

    storages: tuple[Storage, ...]
    orientation: Orientation = "standard"
    lora_b_layout: LoraBLayout = "rank_major"
    up_without_gate: bool = False

    @property
    def has_fused_tensors(self) -> bool:
        """Whether some of the factors are in PEFT's wrapped parameters."""
        return "fused" in self.storages

    @property
    def rank_is_from_tensors(self) -> bool:
        """Whether the tensors' r counts and not the config's.

        NeMo AutoModel scales the rank of experts without saying so in adapter_config.json.
        """
        return self.storages == ("native",)

    def is_peft_layout(
        self, layout: Literal["per_expert", "fused"], orientation: Orientation
    ) -> bool:
        """Whether PEFT itself stores experts like this, one by one or as fused parameters.

        orientation: which way round PEFT has the fused parameters of the base model.
        """
        if self.storages != (layout,):
            return False
        return layout == "per_expert" or (
            self.orientation == orientation and self.lora_b_layout == "rank_major"
        )

    def __str__(self) -> str:
        """For example `per_expert+stacked` or `fused_transposed_grouped_by_expert`."""
        name = "+".join(self.storages)
        if self.orientation == "transposed":
            name += "_transposed"
        if self.lora_b_layout == "grouped_by_expert":
            name += "_grouped_by_expert"
        return name + ("_non_gated" if self.up_without_gate else "")
