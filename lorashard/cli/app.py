"""The Typer app and `main`, the one place that turns errors into exit codes.

Here are the commands for adapters, in shards.py those for shard directories.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn, Optional

import typer

from lorashard.cli import options as opt
from lorashard.cli import render, shards
from lorashard.errors import LorashardError
from lorashard.version import __version__

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
            metavar="ADAPTER",
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
    render.print_result(result, result["out"], as_json=as_json, quiet=quiet)


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


for command in (shards.merge, shards.convert, shards.reshard, shards.pull, shards.push):
    app.command()(command)


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
