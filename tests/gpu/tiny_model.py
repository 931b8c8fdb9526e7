"""What a tiny base model is made of; models.py and families.py have the models."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

HIDDEN, INTERMEDIATE = 512, 384


@dataclass(frozen=True, slots=True)
class TinyModel:
    """How to make one base model, and the adapters that it gets.

    make: returns a model of transformers. fp8: there is a checkpoint with FP8 projections as well;
    quantised: other kinds of weights, of quantised.KINDS. transposed: experts are stored
    `[E, in, out]`; interleaved: gate and up rows take turns. transposed_on_disk: published
    checkpoints are `[E, in, out]`, other than the model. per_expert_names: what adapters with
    tensors for each expert call things that transformers 5 calls otherwise, as pairs (ours, theirs).
    """

    make: Callable[[], Any]
    adapters: tuple[str, ...]
    fp8: bool = True
    quantised: tuple[str, ...] = ()
    transposed: bool = False
    interleaved: bool = False
    transposed_on_disk: bool = False
    per_expert_names: tuple[tuple[str, str], ...] = ()
    # With a layer that predicts one more token (multi-token prediction), for speculative decoding.
    mtp: bool = False
    # Not every transformers release can make it.
    optional: bool = False
