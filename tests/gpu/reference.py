"""What a model should answer: log-probabilities in float32, with adapters merged into the weights."""

import copy
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.gpu.adapter import Factor

NUM_PROMPTS, PROMPT_LENGTH, VOCABULARY = 4, 48, 1024
LARGEST_E4M3 = 448.0


def make_prompts() -> Tensor:
    """The token ids that every case asks about, `[NUM_PROMPTS, PROMPT_LENGTH]`."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(3, VOCABULARY, (NUM_PROMPTS, PROMPT_LENGTH), generator=generator)


def weight_views(
    state: Mapping[str, Tensor], *, transposed: bool, interleaved: bool
) -> dict[str, Tensor]:
    """Every 2-D weight as a view `[out, in]` into `state`, stacked experts one by one.

    transformers 5 stacks experts: `experts.gate_up_proj` becomes `experts.N.gate_proj`, `.up_proj`
    and, both together, `.gate_up_proj`. `transposed` models (gpt-oss, Llama 4) store `[E, in, out]`.
    Where gate and up rows are interleaved (gpt-oss), only the view of both is given.
    """
    views: dict[str, Tensor] = {}
    for name, tensor in state.items():
        stem, _, leaf = name.rpartition(".")
        if tensor.dim() == 3 and stem.endswith(".experts"):
            for expert, stored in enumerate(tensor):
                weight = stored.t() if transposed else stored
                views[f"{stem}.{expert}.{leaf}"] = weight
                if leaf == "gate_up_proj" and not interleaved:
                    half = weight.shape[0] // 2
                    views[f"{stem}.{expert}.gate_proj"] = weight[:half]
                    views[f"{stem}.{expert}.up_proj"] = weight[half:]
        elif tensor.dim() == 2 and leaf == "weight":
            views[stem] = tensor
    return views


class _InputsInFp8(TorchFunctionMode):
    """Rounds what some weights are multiplied with to FP8, one scale a token, as vLLM does."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self._unseen = self._memory = frozenset(map(_memory, weights))

    def __torch_function__(
        self, func: Any, _: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.linear and _memory(args[1]) in self._memory:
            self._unseen -= {_memory(args[1])}
            args = (round_to_fp8(args[0], of_each=-1), *args[1:])
        return func(*args, **(kwargs or {}))

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        if self._unseen and error == (None, None, None):
            raise RuntimeError("this transformers multiplies some FP8 weights in another way")


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def round_to_fp8(values: Tensor, *, of_each: int) -> Tensor:
    """Rounded to what FP8 has, with a scale for all values along one dimension."""
    scale = (values.abs().amax(of_each, keepdim=True) / LARGEST_E4M3).clamp(min=1e-12)
    return (values / scale).to(torch.float8_e4m3fn).to(values.dtype) * scale


class Reference:
    """A float32 copy of a model that can merge adapters and forget them again."""

    def __init__(self, model: Any, *, transposed: bool, interleaved: bool) -> None:
        self._model = model
        self.state: dict[str, Tensor] = model.state_dict()
        self.views = weight_views(self.state, transposed=transposed, interleaved=interleaved)
        self._base = {name: tensor.clone() for name, tensor in self.state.items()}
        self._prompts = make_prompts()

    def remember(self) -> None:
        """Take the weights as they are now for the base model."""
        self._base = {name: tensor.clone() for name, tensor in self.state.items()}

    def restore(self, exact: Mapping[str, Tensor]) -> None:
        """Put other weights into the model."""
        for name, tensor in self.state.items():
            tensor.copy_(exact[name])

    @torch.no_grad()
    def log_probs(
        self,
        factors: Iterable[Factor] = (),
        *,
        in_bf16: bool = False,
        inputs_in_fp8: Iterable[str] = (),
    ) -> Tensor:
        """Of each prompt token but the first, `[NUM_PROMPTS, PROMPT_LENGTH - 1]`.

        in_bf16: compute in it, to see how much noise that makes. inputs_in_fp8: weights whose inputs
        are rounded, for the same reason.
        """
        for factor in factors:
            delta = factor.lora_b.float() @ factor.lora_a.float()
            self.views[factor.weight].add_(delta * factor.scaling)
        rounded = [self.views[weight] for weight in inputs_in_fp8]
        if rounded:
            self._model.set_experts_implementation("eager")  # one by one, by nn.functional.linear
        model = copy.deepcopy(self._model).to(torch.bfloat16) if in_bf16 else self._model
        with _InputsInFp8(rounded) if rounded else nullcontext():
            logits = model(self._prompts).logits.float()
        self.restore(self._base)
        chosen = torch.log_softmax(logits[:, :-1], -1).gather(-1, self._prompts[:, 1:, None])
        return chosen.squeeze(-1).contiguous()
