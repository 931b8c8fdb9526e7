"""Parts of output factors are consistent, or do not come into being."""

from __future__ import annotations

import pytest

from lorashard.convert.peft_tensors import StackPart, whole_stack
from tests.layouts import built, module_of

STACK = module_of(built()).stacks_by_factor["up_proj", "lora_B"]  # [5, 2]


def test_a_whole_stack_may_begin_at_any_row() -> None:
    part = whole_stack(STACK, first_row=5)
    assert (part.rows, part.stack_rows, part.cols) == (range(5, 10), range(5), range(2))


def test_a_part_has_as_many_rows_here_as_there() -> None:
    with pytest.raises(AssertionError):
        StackPart(STACK, range(0, 10, 2), range(4), range(2))


def test_the_columns_of_a_part_are_neighbours() -> None:
    with pytest.raises(AssertionError):
        StackPart(STACK, range(5), range(5), range(0, 4, 2))
