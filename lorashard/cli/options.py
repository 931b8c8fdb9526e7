"""Options and arguments that commands share, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from lorashard.adapter import options as layout_facts
from lorashard.dtypes import CastDtype
from lorashard.errors import AdapterError, PlacementError
from lorashard.vllm_options import Strategy

if TYPE_CHECKING:
    from lorashard.split.pipeline import SplitRequest

Adapter = Annotated[
    str,
    typer.Argument(
        metavar="ADAPTER",
        help="A PEFT adapter: a directory, hf://owner/name[@revision], or another URL.",
        show_default=False,
    ),
]
Shards = Annotated[
    str,
    typer.Argument(
        metavar="SHARDS", help="A shard directory, local or remote.", show_default=False
    ),
]
SeveralShards = Annotated[
    list[str],
    typer.Argument(
        metavar="SHARDS", help="Shard directories, local or remote.", show_default=False
    ),
]
EpSize = Annotated[
    int,
    typer.Option(
        "--ep-size", metavar="N", min=1, help="Number of expert-parallel ranks.", show_default=False
    ),
]
EpRank = Annotated[
    Optional[list[int]],
    typer.Option(
        "--ep-rank",
        metavar="K",
        min=0,
        help="The number of a rank; repeatable.",
        show_default=False,
    ),
]
NodeRanks = Annotated[
    Optional[str],
    typer.Option(
        "--node-ranks",
        metavar="A-B",
        help="The ranks of a node, for example 0-7.",
        show_default=False,
    ),
]
Placement = Annotated[
    Strategy, typer.Option("--placement", help="vLLM's --expert-placement-strategy.")
]
ExpertMap = Annotated[
    Optional[Path],
    typer.Option(
        "--expert-map",
        metavar="FILE",
        help="JSON: the global expert ids of each rank in slot order, as in [[0, 2], [1, 3]], or "
        "vLLM's expert_map. docs/format.md has all forms.",
        show_default=False,
    ),
]
Model = Annotated[
    Optional[str],
    typer.Option(
        "--model",
        metavar="MODEL",
        help="Base model to check against: its directory, its config.json, or its id on the Hub.",
        show_default=False,
    ),
]
NumExperts = Annotated[
    Optional[int],
    typer.Option(
        "--num-experts",
        metavar="E",
        min=1,
        help="Number of experts, for an adapter that trains only some of them; or use --model.",
        show_default=False,
    ),
]
LoraBLayout = Annotated[
    Optional[layout_facts.LoraBLayout],
    typer.Option(
        "--lora-b-layout",
        help="Column order of a fused lora_B, if the adapter does not say.",
        show_default=False,
    ),
]
Orientation = Annotated[
    Optional[layout_facts.Orientation],
    typer.Option(
        "--orientation",
        help="Whether a fused adapter is transposed, if its shapes do not tell.",
        show_default=False,
    ),
]
Dtype = Annotated[
    Optional[CastDtype],
    typer.Option(
        "--dtype", help="Cast all float tensors; merge is then impossible.", show_default=False
    ),
]
AllowPickle = Annotated[
    bool,
    typer.Option(
        "--allow-pickle", help="Read adapter_model.bin with torch.load(weights_only=True)."
    ),
]
TensorParallelSize = Annotated[
    int,
    typer.Option(
        "-tp", "--tensor-parallel-size", metavar="N", min=1, help="vLLM's --tensor-parallel-size."
    ),
]
DataParallelSize = Annotated[
    int,
    typer.Option(
        "-dp", "--data-parallel-size", metavar="N", min=1, help="vLLM's --data-parallel-size."
    ),
]
EnableExpertParallel = Annotated[
    bool,
    typer.Option("-ep", "--enable-expert-parallel", help="vLLM's --enable-expert-parallel."),
]
EnableEplb = Annotated[bool, typer.Option("--enable-eplb", help="vLLM's --enable-eplb.")]
FullyShardedLoras = Annotated[
    bool, typer.Option("--fully-sharded-loras", help="vLLM's --fully-sharded-loras.")
]
ExpertPlacementStrategy = Annotated[
    Strategy,
    typer.Option("--expert-placement-strategy", help="vLLM's --expert-placement-strategy."),
]
AdapterOutput = Annotated[
    str,
    typer.Option(
        "-o",
        "--output",
        metavar="ADAPTER",
        help="Target directory; or where to upload it: hf://owner/name or another URL.",
        show_default=False,
    ),
]
Private = Annotated[
    bool,
    typer.Option("--private", help="With -o hf://: if the repository is new, make it private."),
]
Force = Annotated[
    bool, typer.Option("--force", help="Replace a finished target directory, atomically.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check and decide everything, but write nothing.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
HtmlPage = Annotated[
    Optional[Path],
    typer.Option(
        "--html",
        metavar="FILE",
        help="Also write a page with a map of the experts, for a browser; it needs nothing else.",
        show_default=False,
    ),
]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Print errors only.")]


def refuse_two_placements(placement: Strategy, expert_map: Path | None) -> None:
    """Raise PlacementError if both options say where experts go."""
    if expert_map is not None and placement != "linear":
        raise PlacementError(
            "--expert-map and --placement both say where experts go.", hint="Use one of them."
        )


def refuse_two_counts(model: str | None, num_experts: int | None) -> None:
    """Raise AdapterError if both options give the number of experts."""
    if num_experts is not None and model is not None:
        raise AdapterError(
            "--model and --num-experts both give the number of experts.", hint="Use one of them."
        )


def layout_options(
    *,
    model: str | None,
    num_experts: int | None,
    lora_b_layout: layout_facts.LoraBLayout | None,
    orientation: layout_facts.Orientation | None,
) -> layout_facts.LayoutOptions:
    """What the options say about an adapter's layout. Raises AdapterError if they clash."""
    refuse_two_counts(model, num_experts)
    return layout_facts.LayoutOptions(
        num_experts=num_experts, lora_b_layout=lora_b_layout, orientation=orientation
    )


def split_request(
    *,
    ep_size: int,
    placement: Strategy,
    expert_map: Path | None,
    model: str | None,
    num_experts: int | None,
    lora_b_layout: layout_facts.LoraBLayout | None,
    orientation: layout_facts.Orientation | None,
    dtype: CastDtype | None,
    allow_pickle: bool,
    sync: bool = True,
) -> SplitRequest:
    """The request that the options make. Raises AdapterError or PlacementError if they clash."""
    from lorashard.split.pipeline import SplitRequest  # noqa: PLC0415

    refuse_two_placements(placement, expert_map)
    return SplitRequest(
        ep_size=ep_size,
        strategy=placement,
        expert_map=expert_map,
        model=model,
        dtype=dtype,
        options=layout_options(
            model=model,
            num_experts=num_experts,
            lora_b_layout=lora_b_layout,
            orientation=orientation,
        ),
        allow_pickle=allow_pickle,
        sync=sync,
    )


def chosen_ranks(ep_rank: list[int] | None, node_ranks: str | None) -> tuple[int, ...]:
    """The ranks that --ep-rank and --node-ranks name, or none. Raises PlacementError."""
    from lorashard.shards.placement import MAX_EP_SIZE  # noqa: PLC0415

    ranks = set(ep_rank or ())
    if node_ranks is not None:
        first, dash, last = node_ranks.partition("-")
        is_pair = first.isdecimal() and dash and last.isdecimal()
        if is_pair and max(len(first), len(last)) > len(str(MAX_EP_SIZE)):
            raise PlacementError(
                f"--node-ranks {node_ranks[:40]!r} is beyond rank {MAX_EP_SIZE - 1}.",
                hint="For example 0-7.",
            )
        if not (is_pair and int(first) <= int(last)):
            raise PlacementError(
                f"--node-ranks {node_ranks!r} is not a range.", hint="For example 0-7."
            )
        ranks |= set(range(int(first), int(last) + 1))
    return tuple(sorted(ranks))
