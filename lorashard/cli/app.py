"""The Typer app and `main`, the one place that turns errors into exit codes."""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn, Optional

import typer

from lorashard import __version__
from lorashard.cli import options as opt
from lorashard.cli import render
from lorashard.errors import LorashardError, PlacementError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: importing rich would be half of the time of `--help`
    help="Pre-sliced LoRA adapters for Mixture-of-Experts models with expert parallelism.",
    epilog="Exit codes: 0 done, 1 unexpected, 2 usage, 3 adapter, 4 placement, 5 shard.",
)

_Out = Annotated[
    Optional[Path],
    typer.Option(
        "-o", "--output", metavar="OUT",
        help="Target directory; with several adapters the directory for all of them. "
        "[default: ADAPTER-epN]",
        show_default=False,
    ),
]  # fmt: skip


def _version(value: bool) -> None:
    if value:
        render.print_line(f"lorashard {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def split(
    ep_size: opt.EpSize,
    adapters: Annotated[
        Optional[list[str]],
        typer.Argument(
            metavar="ADAPTER...",
            help="PEFT adapters: directories, hf://owner/name[@revision], other URLs, patterns such "
            "as 'runs/*', or a Hub collection, hf://collections/owner/name.",
            show_default=False,
        ),
    ] = None,
    out: _Out = None,
    placement: opt.Placement = "linear",
    expert_map: opt.ExpertMap = None,
    model: opt.Model = None,
    num_experts: opt.NumExperts = None,
    dtype: opt.Dtype = None,
    lora_b_layout: opt.LoraBLayout = None,
    orientation: opt.Orientation = None,
    allow_pickle: opt.AllowPickle = False,
    force: opt.Force = False,
    listed: Annotated[
        Optional[typer.FileText],
        typer.Option(
            "--from",
            metavar="FILE",
            help="A file with one adapter a line; - is stdin.",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option("--workers", min=1, help="Of several adapters, how many at once.")
    ] = 2,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Leave a finished directory of the same adapter as it is."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Decide all, write nothing.")] = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Write one pre-sliced shard per expert-parallel rank."""
    from lorashard.cli.split import chosen_jobs, run_batch, run_split  # noqa: PLC0415

    request = opt.split_request(
        ep_size, placement, expert_map, model, num_experts, lora_b_layout, orientation, dtype,
        allow_pickle,
    )  # fmt: skip
    jobs, several = chosen_jobs(adapters or [], listed, out, ep_size)
    if several:
        gc.enable()  # what one adapter leaves behind is not there at the next
        run_batch(
            jobs, request, workers=workers, force=force, resume=resume, dry_run=dry_run,
            as_json=as_json, quiet=quiet,
        )  # fmt: skip
        return
    result = run_split(jobs[0], request, force=force, resume=resume, dry_run=dry_run, quiet=quiet)
    if as_json:
        render.print_json(result)
    elif not quiet:
        render.print_line(result["out"])


@app.command()
def verify(
    shards: opt.Shards,
    against: Annotated[
        Optional[str],
        typer.Option(
            "--against",
            metavar="ADAPTER",
            help="Also prove every value against the source.",
            show_default=False,
        ),
    ] = None,
    ep_rank: opt.EpRank = None,
    node_ranks: opt.NodeRanks = None,
    allow_pickle: opt.AllowPickle = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Check structure, coverage, digests and values of a shard directory, or of some of its ranks."""
    from lorashard.cli.check import run_verify  # noqa: PLC0415

    ranks = opt.chosen_ranks(ep_rank, node_ranks) or None
    run_verify(shards, against, ranks, allow_pickle=allow_pickle, as_json=as_json, quiet=quiet)


@app.command()
def inspect(
    path: Annotated[
        str,
        typer.Argument(
            metavar="ADAPTER_OR_SHARDS",
            help="An adapter or a shard directory, here or remote.",
            show_default=False,
        ),
    ],
    model: opt.Model = None,
    num_experts: opt.NumExperts = None,
    lora_b_layout: opt.LoraBLayout = None,
    orientation: opt.Orientation = None,
    allow_pickle: opt.AllowPickle = False,
    as_json: opt.Json = False,
) -> None:
    """Show what an adapter or a shard directory holds; reads headers only."""
    from lorashard.cli.look import run_inspect  # noqa: PLC0415

    request = opt.split_request(
        1, "linear", None, model, num_experts, lora_b_layout, orientation, None, allow_pickle
    )
    run_inspect(path, request, as_json=as_json)


@app.command()
def plan(
    adapter: opt.Adapter,
    ep_size: opt.EpSize,
    max_loras: Annotated[int, typer.Option(min=1, help="vLLM's --max-loras.")] = 1,
    max_lora_rank: Annotated[
        Optional[int],
        typer.Option(
            min=1, help="vLLM's --max-lora-rank. [default: the adapter's]", show_default=False
        ),
    ] = None,
    placement: opt.Placement = "linear",
    expert_map: opt.ExpertMap = None,
    model: opt.Model = None,
    num_experts: opt.NumExperts = None,
    dtype: opt.Dtype = None,
    lora_b_layout: opt.LoraBLayout = None,
    orientation: opt.Orientation = None,
    allow_pickle: opt.AllowPickle = False,
    as_json: opt.Json = False,
) -> None:
    """Show what a split would give each rank: experts, bytes, GPU buffers, host memory."""
    from lorashard.cli.look import run_plan  # noqa: PLC0415

    request = opt.split_request(
        ep_size, placement, expert_map, model, num_experts, lora_b_layout, orientation, dtype,
        allow_pickle,
    )  # fmt: skip
    run_plan(adapter, request, max_loras, max_lora_rank, as_json=as_json)


@app.command()
def merge(
    shards: opt.Shards,
    out: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="ADAPTER", help="Target directory.", show_default=False
        ),
    ],
    force: opt.Force = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Give back the source adapter, bit for bit."""
    from lorashard.cli.split import run_merge  # noqa: PLC0415

    result = run_merge(shards, out, force=force, quiet=quiet)
    if as_json:
        render.print_json(result)
    elif not quiet:
        render.print_line(str(out))


@app.command()
def convert(
    shards: opt.Shards,
    out: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="ADAPTER", help="Target directory.", show_default=False
        ),
    ],
    layout: Annotated[
        opt.LayoutName,
        typer.Option(
            "--layout",
            help="per_expert: a pair for each expert, for vLLM and PEFT with transformers 4. "
            "fused: one pair for all, for PEFT >= 0.19 with transformers 5.",
            show_default=False,
        ),
    ],
    model: opt.Model = None,
    orientation: Annotated[
        Optional[opt.OrientationName],
        typer.Option(
            "--orientation",
            help="Which way round PEFT has the fused parameters, where no model is named.",
            show_default=False,
        ),
    ] = None,
    force: opt.Force = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Write a plain PEFT adapter in the layout of choice, with the same weight changes."""
    from lorashard.cli.convert import run_convert  # noqa: PLC0415

    result = run_convert(shards, out, layout, model, orientation, force=force, quiet=quiet)
    if as_json:
        render.print_json(result)
    elif not quiet:
        render.print_line(str(out))


@app.command()
def reshard(
    shards: opt.Shards,
    ep_size: opt.EpSize,
    out: Annotated[
        Optional[Path],
        typer.Option(
            "-o",
            "--output",
            metavar="OUT",
            help="Target directory. [default: SHARDS, its name ending in -epN]",
            show_default=False,
        ),
    ] = None,
    placement: opt.Placement = "linear",
    expert_map: opt.ExpertMap = None,
    force: opt.Force = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Place the experts of a shard directory anew, bit for bit, without the source adapter."""
    from lorashard.cli.reshard import run_reshard, target  # noqa: PLC0415
    from lorashard.remote import locate  # noqa: PLC0415

    opt.refuse_two_placements(placement, expert_map)
    place = locate(shards)
    out = target(place, out, ep_size)
    result = run_reshard(place, out, ep_size, placement, expert_map, force=force, quiet=quiet)
    if as_json:
        render.print_json(result)
    elif not quiet:
        render.print_line(str(out))


@app.command()
def pull(
    shards: Annotated[
        str,
        typer.Argument(
            metavar="SHARDS",
            help="A shard directory: hf://owner/name[@revision], another URL, or a directory.",
            show_default=False,
        ),
    ],
    ep_rank: opt.EpRank = None,
    node_ranks: opt.NodeRanks = None,
    out: Annotated[
        Optional[Path],
        typer.Option(
            "-o",
            "--output",
            metavar="OUT",
            help="Target directory. [default: SHARDS' name]",
            show_default=False,
        ),
    ] = None,
    force: opt.Force = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Fetch what some ranks need of a shard directory: no other rank's bytes."""
    from lorashard.cli.fetch import run_pull  # noqa: PLC0415

    ranks = opt.chosen_ranks(ep_rank, node_ranks)
    if not ranks:
        raise PlacementError("No rank is named.", hint="--ep-rank 3, or --node-ranks 0-7.")
    result = run_pull(shards, ranks, out, force=force, quiet=quiet)
    if as_json:
        render.print_json(result)
    elif not quiet:
        render.print_line(result["out"])


@app.command()
def push(
    shards: Annotated[
        Path, typer.Argument(metavar="SHARDS", help="A shard directory.", show_default=False)
    ],
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="hf://owner/name[@branch][/folder], or another URL.",
            show_default=False,
        ),
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace shards at a URL; on the Hub a commit always does."),
    ] = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Check a shard directory and upload it, with a model card."""
    from lorashard.cli.push import run_push  # noqa: PLC0415

    result = run_push(shards, target, private=private, force=force, quiet=quiet)
    if as_json:
        render.print_json(result)
    elif not quiet:
        render.print_line(result["place"])


@app.command()
def doctor(
    path: Annotated[
        Optional[Path],
        typer.Argument(
            metavar="ADAPTER_OR_SHARDS",
            help="An adapter or a shard directory to be served; may be left out.",
            show_default=False,
        ),
    ] = None,
    tensor_parallel_size: opt.TensorParallelSize = 1,
    data_parallel_size: opt.DataParallelSize = 1,
    enable_expert_parallel: opt.EnableExpertParallel = False,
    enable_eplb: opt.EnableEplb = False,
    fully_sharded_loras: opt.FullyShardedLoras = False,
    expert_placement_strategy: opt.ExpertPlacementStrategy = "linear",
    max_lora_rank: Annotated[int, typer.Option(min=1, help="vLLM's --max-lora-rank.")] = 16,
    model: opt.Model = None,
    as_json: opt.Json = False,
) -> None:
    """Show what the vLLM plugin finds here, and would do with this adapter and these flags.

    Run it in vLLM's own environment. Exit code 5 if something would be refused or is broken.
    """
    from lorashard.cli.doctor import EngineFlags, run_doctor  # noqa: PLC0415

    flags = EngineFlags(
        tensor_parallel_size, data_parallel_size, enable_expert_parallel, enable_eplb,
        fully_sharded_loras, expert_placement_strategy, max_lora_rank,
    )  # fmt: skip
    run_doctor(path, flags, model, as_json=as_json)


def main() -> NoReturn:
    """Run the command line; the exit code says what kind of error it was."""
    # A header gives a few 100,000 small objects that live to the end and hold no cycles: to look
    # for garbage among them costs a third of the time of `inspect`.
    gc.disable()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminated)
    render.settle_streams()
    try:
        app()
    except LorashardError as err:
        _fail(str(err), err.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as err:
        if os.environ.get("LORASHARD_DEBUG"):
            raise
        _fail(
            f"unexpected {type(err).__name__}: {err}\n  LORASHARD_DEBUG=1 shows where; "
            "please report it.",
            1,
        )
    sys.exit(0)


def _fail(message: str, code: int) -> NoReturn:
    render.say(f"error: {message}")
    sys.exit(code)


def _terminated(signum: int, _frame: Any) -> NoReturn:
    """A signal unwinds the stack, so that nothing half-written stays behind."""
    sys.exit(128 + signum)
