"""Up to 8 ranks, with experts and parts of experts dealt among them in any way."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lorashard import LayoutOptions, SplitRequest, split_adapter
from lorashard.errors import LayoutError
from lorashard.publish.writer import AdapterWriter
from tests.publish.test_writer import (
    commit_all,
    files_of,
    gathered,
    leftovers,
    own_experts,
    own_rest,
    writers_of,
)

MOST_RANKS, LAYERS = 8, 2


@dataclass(frozen=True)
class Piece:
    """The indices [begin, end) along an axis of a tensor, on a rank."""

    name: str
    axis: int
    begin: int
    end: int
    rank: int

    def give(self, tensors: dict[str, torch.Tensor], writer: AdapterWriter) -> None:
        tensor = tensors[self.name]
        own = tensor.narrow(self.axis, self.begin, self.end - self.begin)
        size = tensor.shape[self.axis]
        writer.tensor(self.name, own, axis=self.axis, begin=self.begin, size=size)


@dataclass(frozen=True)
class Dealing:
    """whole: for each call of `experts`, the layer, the rank and the ids. pieces: of the others."""

    request: SplitRequest
    world: int
    whole: tuple[tuple[int, int, tuple[int, ...]], ...]
    pieces: tuple[Piece, ...]

    def writers(
        self, path: Path, out: Path, pieces: Sequence[Piece] | None = None
    ) -> list[AdapterWriter]:
        request, tensors = self.request, load_file(path / "adapter_model.safetensors")
        writers = writers_of(
            path, out, self.world,
            ep_size=request.ep_size, strategy=request.strategy, options=request.options,
        )  # fmt: skip
        own_rest(path, writers[-1])
        for layer, rank, ids in self.whole:
            own_experts(path, writers[rank], ids, [layer])
        for piece in self.pieces if pieces is None else pieces:
            piece.give(tensors, writers[piece.rank])
        return writers


@st.composite
def cut_tensors(draw: st.DrawFn, tensors: dict[str, torch.Tensor], world: int) -> list[Piece]:
    """Each tensor in pieces along r, in or out, on any ranks."""
    pieces = []
    for name, tensor in tensors.items():
        axis = draw(st.integers(0, 1))
        size = tensor.shape[axis]
        cuts = draw(st.sets(st.integers(1, size - 1), max_size=3)) if size > 1 else set()
        for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), size]):
            pieces.append(Piece(name, axis, begin, end, draw(st.integers(0, world - 1))))
    return draw(st.permutations(pieces))


@st.composite
def dealings(draw: st.DrawFn, path: Path, num_experts: int, *, cut_some: bool = False) -> Dealing:
    world = draw(st.integers(1, MOST_RANKS))
    request = SplitRequest(
        draw(st.integers(1, 4)),
        draw(st.sampled_from(["linear", "round_robin"])),
        options=LayoutOptions(num_experts=num_experts, hidden_size=6, intermediate_size=5),
    )
    whole, in_pieces = [], {}
    tensors = load_file(path / "adapter_model.safetensors")
    for layer in range(LAYERS):
        cut = draw(st.sets(st.integers(0, num_experts - 1), min_size=int(cut_some), max_size=2))
        others = draw(st.permutations(sorted(set(range(num_experts)) - cut)))
        owners = [draw(st.integers(0, world - 1)) for _ in others]
        for rank in sorted(set(owners)):
            ids = [expert for expert, owner in zip(others, owners) if owner == rank]
            at = draw(st.integers(0, len(ids)))  # in two calls, or in one
            whole += [(layer, rank, tuple(own)) for own in (ids[:at], ids[at:]) if own]
        in_pieces |= {
            name: tensor
            for name, tensor in tensors.items()
            if (match := re.search(rf"\.layers\.{layer}\..*\.experts\.(\d+)\.", name))
            and int(match[1]) in cut
        }
    return Dealing(request, world, tuple(whole), tuple(draw(cut_tensors(in_pieces, world))))


def adapter_of(data: st.DataObject, folder: Path, fewest: int) -> tuple[Path, int]:
    num_experts = data.draw(st.integers(fewest, 9))
    path = gathered(
        folder, num_experts=num_experts, lora_rank=data.draw(st.integers(1, 4)), num_layers=LAYERS,
        dtype=data.draw(st.sampled_from([torch.bfloat16, torch.float32])),
    )  # fmt: skip
    return path, num_experts


@settings(deadline=None)
@given(st.data())
def test_experts_and_parts_of_experts_are_dealt_in_any_way(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("dealt")
    path, num_experts = adapter_of(data, folder, 1)
    dealing = data.draw(dealings(path, num_experts))
    made = commit_all(dealing.writers(path, folder / "out"))
    assert made == [split_adapter(path, folder / "split", dealing.request)] * dealing.world
    assert files_of(folder / "out") == files_of(folder / "split")


def refused(writers: Sequence[AdapterWriter], folder: Path, *named: str) -> list[Any]:
    """The errors of all ranks, each of which names this; nothing is left of the commit."""
    errors = commit_all(writers)
    for error in errors:
        assert isinstance(error, LayoutError)
        assert [word for word in named if word not in str(error)] == []
    assert leftovers(folder) == {"gathered"}
    return errors


@settings(deadline=None)
@given(st.data())
def test_what_is_given_twice_is_refused_with_its_name_and_both_ranks(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("twice")
    path, num_experts = adapter_of(data, folder, 1)
    dealing = data.draw(dealings(path, num_experts, cut_some=True))
    piece = data.draw(st.sampled_from(dealing.pieces))
    again = data.draw(st.integers(0, dealing.world - 1))
    twice = Piece(piece.name, piece.axis, piece.begin, piece.end, again)
    first, second = sorted((piece.rank, again))
    refused(
        dealing.writers(path, folder / "out", [*dealing.pieces, twice]),
        folder,
        f"{piece.name}: ranks {first} and {second} both have index {piece.begin} of axis {piece.axis}",
    )


@settings(deadline=None)
@given(st.data())
def test_a_part_that_no_rank_gives_is_refused_with_its_name(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("part")
    path, num_experts = adapter_of(data, folder, 1)
    dealing = data.draw(dealings(path, num_experts, cut_some=True))
    cut = [
        piece for piece in dealing.pieces if sum(p.name == piece.name for p in dealing.pieces) > 1
    ]
    assume(cut)
    gone = data.draw(st.sampled_from(cut))
    left = [piece for piece in dealing.pieces if piece != gone]
    refused(
        dealing.writers(path, folder / "out", left),
        folder,
        f"{gone.name}: no rank has index {gone.begin} of axis {gone.axis}",
    )


@settings(deadline=None)
@given(st.data())
def test_an_expert_that_no_rank_gives_is_refused_with_its_number(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("expert")
    path, num_experts = adapter_of(data, folder, 2)
    dealing = data.draw(dealings(path, num_experts, cut_some=True))
    name = data.draw(st.sampled_from(sorted({piece.name for piece in dealing.pieces})))
    match = re.fullmatch(r"base_model\.model\.(.*\.experts)\.(\d+)\.(\w+)\.lora_.\.weight", name)
    assert match is not None
    module, expert, projection = match.groups()
    prefix = f"base_model.model.{module}.{expert}.{projection}."
    left = [piece for piece in dealing.pieces if not piece.name.startswith(prefix)]
    refused(
        dealing.writers(path, folder / "out", left),
        folder,
        f"{module}: no rank has {projection} lora_A of expert {expert} (1 of {num_experts}).",
    )
