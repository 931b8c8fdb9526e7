"""What a model should answer: log-probabilities in float32, with adapters merged into the weights."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tests.gpu.loras import Factor

NUM_PROMPTS, PROMPT_LENGTH, VOCABULARY = 4, 48, 1024


def make_prompts() -> Tensor:
    """The token ids that every case asks about, `[NUM_PROMPTS, PROMPT_LENGTH]`."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(3, VOCABULARY, (NUM_PROMPTS, PROMPT_LENGTH), generator=generator)


def weight_views(state: Mapping[str, Tensor], *, transposed: bool) -> dict[str, Tensor]:
    """Every 2-D weight as a view `[out, in]` into `state`, stacked experts one by one.

    transformers 5 stacks experts: `experts.gate_up_proj` becomes `experts.N.gate_proj`, `.up_proj`
    and, both together, `.gate_up_proj`. `transposed` models (gpt-oss) store `[E, in, out]`, with
    gate and up rows interleaved, so there only the view of both is given.
    """
    views: dict[str, Tensor] = {}
    for name, tensor in state.items():
        stem, _, leaf = name.rpartition(".")
        if tensor.dim() == 3 and stem.endswith(".experts"):
            for expert, stored in enumerate(tensor):
                weight = stored.t() if transposed else stored
                views[f"{stem}.{expert}.{leaf}"] = weight
                if leaf == "gate_up_proj" and not transposed:
                    half = weight.shape[0] // 2
                    views[f"{stem}.{expert}.gate_proj"] = weight[:half]
                    views[f"{stem}.{expert}.up_proj"] = weight[half:]
        elif tensor.dim() == 2 and leaf == "weight":
            views[stem] = tensor
    return views


class Reference:
    """A float32 copy of a model that can merge adapters and forget them again."""

    def __init__(self, model: Any, *, transposed: bool) -> None:
        self._model = model
        self.state: dict[str, Tensor] = model.state_dict()
        self.views = weight_views(self.state, transposed=transposed)
        self._base = {name: tensor.clone() for name, tensor in self.state.items()}
        self._prompts = make_prompts()

    def remember(self) -> None:
        """Take the weights as they are now for the base model."""
        self._base = {name: tensor.clone() for name, tensor in self.state.items()}

    @torch.no_grad()
    def log_probs(self, factors: Iterable[Factor] = ()) -> Tensor:
        """Of each prompt token but the first, `[NUM_PROMPTS, PROMPT_LENGTH - 1]`."""
        for factor in factors:
            delta = factor.lora_b.float() @ factor.lora_a.float()
            self.views[factor.weight].add_(delta * factor.scaling)
        logits = self._model(self._prompts).logits.float()
        for name, tensor in self.state.items():
            tensor.copy_(self._base[name])
        chosen = torch.log_softmax(logits[:, :-1], -1).gather(-1, self._prompts[:, 1:, None])
        return chosen.squeeze(-1).contiguous()
