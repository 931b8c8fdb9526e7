"""Parameters of the Python API in messages -> the options of the command line.

The core does not know who calls it. Its messages name parameters, as `model` or `force=True`, which
is what a caller in Python has; a command, and the plugin in a server's answer, show --model and
--force. Pure.
"""

from __future__ import annotations

import re

FLAGS = {
    "against": "--against",
    "allow_pickle": "--allow-pickle",
    "dtype": "--dtype",
    "ep_ranks": "--ep-rank and --node-ranks",
    "ep_size": "--ep-size",
    "expert_map": "--expert-map",
    "force": "--force",
    "lora_b_layout": "--lora-b-layout",
    "model": "--model",
    "num_experts": "--num-experts",
    "orientation": "--orientation",
    "out": "-o",
    "resume": "--resume",
    "strategy": "--placement",
}
_PARAMETER = re.compile(rf"`({'|'.join(FLAGS)})(?:=([^`\s]+))?`")


def with_flags(text: str) -> str:
    """The text with `model=DIR` as --model DIR, and `force=True` as --force."""
    return _PARAMETER.sub(_flag, text)


def _flag(named: re.Match[str]) -> str:
    flag, value = FLAGS[named[1]], named[2]
    return flag if value in (None, "True") else f"{flag} {value}"
