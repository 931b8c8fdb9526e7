"""How `lorashard --help` is laid out: commands in groups, and examples at the end of each help.

Plain text: importing rich would take half of the time of `--help`.
"""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

from lorashard.installing import documentation

# Each group of commands, by the title that it has in `--help`, in this order.
GROUPS = {
    "Make shards": ("split", "reshard"),
    "Inspect and check": ("inspect", "plan", "verify", "doctor"),
    "Restore an adapter": ("merge", "convert"),
    "Copy shards": ("pull", "push"),
    "About this installation": ("version", "env", "help"),
}
EXAMPLES = {
    "split": (
        "lorashard split my-adapter --ep-size 8",
        "lorashard split hf://owner/adapter --ep-size 8 -o shards",
        "lorashard split my-adapter --ep-size 8 -o s3://bucket/mine-ep8",
        "lorashard split 'runs/*' --ep-size 8 -o s3://bucket/all --resume",
        "lorashard split --from - --part 0/4 --ep-size 8 -o all --resume",
    ),
    "reshard": (
        "lorashard reshard my-adapter-ep8 --ep-size 4",
        "lorashard reshard s3://bucket/mine-ep8 --ep-size 4 -o s3://bucket/mine-ep4",
    ),
    "inspect": ("lorashard inspect my-adapter", "lorashard inspect hf://owner/shards --json"),
    "plan": (
        "lorashard plan my-adapter --ep-size 8 --max-loras 4",
        "lorashard plan my-adapter --ep-size 8 --html plan.html",
    ),
    "verify": (
        "lorashard verify my-adapter-ep8",
        "lorashard verify my-adapter-ep8 --against my-adapter",
        "lorashard verify my-adapter-ep8 --node-ranks 0-3",
        "lorashard verify all/*-ep8",
    ),
    "doctor": (
        "lorashard doctor",
        "lorashard doctor my-adapter-ep8 -tp 8 --enable-expert-parallel",
        "lorashard doctor s3://bucket/shards -tp 8 -ep",
        "lorashard doctor my-adapter-ep8 -- vllm serve MODEL --enable-lora -tp 8 -ep",
    ),
    "merge": (
        "lorashard merge my-adapter-ep8 -o my-adapter",
        "lorashard merge s3://bucket/mine-ep8 -o hf://owner/mine --private",
    ),
    "convert": (
        "lorashard convert my-adapter-ep8 --layout per_expert -o plain",
        "lorashard convert my-adapter-ep8 --layout fused --model MODEL -o s3://bucket/fused",
    ),
    "pull": (
        "lorashard pull hf://owner/shards --node-ranks 0-7",
        "lorashard pull s3://bucket/shards --ep-rank 3 -o /models/mine",
    ),
    "push": (
        "lorashard push my-adapter-ep8 hf://owner/shards --private",
        "lorashard push my-adapter-ep8 s3://bucket/shards",
    ),
    "version": (),
    "env": ("lorashard env --json",),
    "help": ("lorashard help split",),
}


def epilog_of(command: str) -> str:
    """The end of a command's help: examples, and where to read more."""
    lines = "\n".join(f"  {example}" for example in EXAMPLES[command])
    # \b: the lines are not to be joined.
    examples = f"\b\nExamples:\n{lines}\n\n" if lines else ""
    return f"{examples}{more_in('cli.md')}"


def more_in(page: str) -> str:
    """The line of a help that says where a page of the documentation is on this machine."""
    return f"\b\nMore: {documentation() / page}"


class GroupedHelp(TyperGroup):
    """Lists the commands in `GROUPS`, each with the whole first line of its help."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of commands."""
        for title, names in GROUPS.items():
            found = [(name, self.get_command(ctx, name)) for name in names]
            rows = [(name, (c.help or "").partition("\n")[0]) for name, c in found if c is not None]
            with formatter.section(title):
                formatter.write_dl(rows)
