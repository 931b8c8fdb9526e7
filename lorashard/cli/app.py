"""The Typer app and `main`, the one place that turns errors into exit codes."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable
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
from lorashard.cli.groups import GROUPS, GroupedHelp, epilog_of
from lorashard.errors import AdapterError, LorashardError
from lorashard.storage.system_errors import describe, hint_of

# Help is as wide as the terminal, until lines become hard to read.
_MOST_COLUMNS = 120

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
    epilog="Exit codes: 0 done, 1 unexpected, 2 usage, 3 adapter, 4 placement, 5 shard.",
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
        if err.code == 128 + signal.SIGINT:  # Typer's, for Ctrl-C
            render.say("interrupted")
        # Typer has said on stderr what is wrong with the arguments, and exits while it handles that.
        if (wrong_usage := getattr(err.__context__, "format_message", None)) is not None:
            _print_error_json(wrong_usage(), "Add --help to see the options.", int(err.code or 0))
        raise
    except LorashardError as err:
        _fail(err.message, hint_of(err), err.exit_code)
    except Exception as err:
        if os.environ.get("LORASHARD_DEBUG"):
            raise
        if isinstance(err, OSError) and (described := describe(err)):
            _fail(*described, AdapterError.exit_code)
        _fail(
            f"unexpected {type(err).__name__}: {err}",
            "Please report this. Set LORASHARD_DEBUG=1 to see where it happened.",
            1,
        )
    sys.exit(0)


def _fail(message: str, hint: str | None, code: int) -> NoReturn:
    render.say_error(message, hint)
    _print_error_json(message, hint, code)
    sys.exit(code)


def _print_error_json(message: str, hint: str | None, code: int) -> None:
    ours = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    if "--json" in ours and not render.printed_json():
        render.print_json({"error": message, "hint": hint, "exit_code": code})


def _exit_on_signal(signum: int, _frame: Any) -> NoReturn:
    """Unwind the stack, so that nothing half-written is left."""
    sys.exit(128 + signum)
