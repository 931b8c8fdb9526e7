"""The Typer app and `main`, the one place that turns errors into exit codes."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NoReturn

import typer

from lorashard.cli import (
    about,
    convert,
    doctor,
    inspect,
    merge,
    plan,
    pull,
    push,
    render,
    reshard,
    split,
    verify,
)
from lorashard.cli.error_json import USAGE, error_json, json_of, where_of
from lorashard.cli.groups import GROUPS, GroupedHelp, epilog_of, more_in
from lorashard.errors import AdapterError, LorashardError
from lorashard.storage.system_errors import describe

# Help is as wide as the terminal, until lines become hard to read.
_MOST_COLUMNS = 120

# Exit codes -> what is said. That of SIGINT is Typer's, for Ctrl-C.
_STOPPED = {
    128 + signal.SIGINT: "interrupted",
    128 + signal.SIGTERM: "stopped by SIGTERM",
    128 + signal.SIGHUP: "stopped by SIGHUP",
}

app = typer.Typer(
    cls=GroupedHelp,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": _MOST_COLUMNS,
    },
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: importing rich would take half of the time of `--help`
    help="Split LoRA adapters of Mixture-of-Experts models into one file per expert-parallel rank.",
    epilog="Exit codes: 0 done, 1 unexpected, 2 usage, 3 adapter, 4 placement, 5 shard.\n\n"
    + more_in("cli.md"),
)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        about.version()
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


_COMMANDS: dict[str, Callable[..., None]] = {
    "split": split.split,
    "reshard": reshard.reshard,
    "inspect": inspect.inspect,
    "plan": plan.plan,
    "verify": verify.verify,
    "doctor": doctor.doctor,
    "merge": merge.merge,
    "convert": convert.convert,
    "pull": pull.pull,
    "push": push.push,
    "version": about.version,
    "env": about.env,
    "help": about.help,
}
for _name in (name for names in GROUPS.values() for name in names):
    app.command(_name, epilog=epilog_of(_name))(_COMMANDS[_name])


def main() -> NoReturn:
    """Run the command line; the exit code says what kind of error it was."""
    # A header gives a few 100,000 small objects that live to the end and form no cycles. Looking
    # for garbage among them takes a third of the time of `inspect`.
    gc.disable()
    # Nothing here uses numpy's BLAS, but with numpy it starts a thread for each core, and they spin.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup: it is to be ignored
            signal.signal(number, _exit_on_signal)
    render.settle_streams()
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except SystemExit as err:
        if err.code in _STOPPED:
            render.say_interrupted(_STOPPED[err.code])
        # Typer has said on stderr what is wrong with the arguments, and exits while it handles that.
        if (wrong_usage := getattr(err.__context__, "format_message", None)) is not None:
            hint = "Add --help to see the options."
            _print_error_json(error_json(USAGE, wrong_usage(), hint, int(err.code or 0)))
        raise
    except LorashardError as err:
        _fail(json_of(err))
    except Exception as err:
        if os.environ.get("LORASHARD_DEBUG"):
            raise
        kind, where = type(err).__name__, where_of(err)
        if isinstance(err, OSError) and (described := describe(err)):
            _fail(error_json(kind, *described, AdapterError.exit_code, where))
        hint = "Please report this. Set LORASHARD_DEBUG=1 to see where it happened."
        _fail(error_json(kind, f"unexpected {kind}: {err}", hint, 1, where))
    sys.exit(0)


def _fail(error: Mapping[str, Any]) -> NoReturn:
    render.say_error(error["error"], error["hint"], error["rule"])
    _print_error_json(error)
    sys.exit(error["exit_code"])


def _print_error_json(error: Mapping[str, Any]) -> None:
    ours = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    if "--json" in ours and not render.printed_json():
        render.print_json(error)


def _exit_on_signal(signum: int, _frame: Any) -> NoReturn:
    """Unwind the stack, so that nothing half-written is left."""
    sys.exit(128 + signum)
