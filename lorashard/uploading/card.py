"""The model card of what is uploaded: base model, source, placement, how to serve. Pure.

In: the manifest, the adapter's config and the place. Out: Markdown, with a seal by which a card that
someone has edited is recognised.
"""

from __future__ import annotations

import re
import shlex
from typing import Any

from blake3 import blake3

from lorashard.adapter.config import LoraConfig
from lorashard.installing import INSTALL, INSTALL_IN
from lorashard.shards.manifest import Manifest
from lorashard.shards.names import adapter_name
from lorashard.shards.placement import Placement
from lorashard.storage.hub import last_name
from lorashard.version import __version__
from lorashard.vllm_options import smallest_max_lora_rank

CARD_NAME = "README.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# The last line of a card holds the digest of everything above it. A card with another digest was
# edited by someone, and is not overwritten.
_SEAL = re.compile(r"<!-- written by lorashard push, ([0-9a-f]{16}) -->\n\Z")


def format_card(manifest: Manifest, config: LoraConfig, place: str) -> str:
    """The whole card. place: where the directory will be, as `pull` takes it."""
    name = last_name(place)
    folder = shlex.quote(name)
    placement, ep_size = manifest.placement, manifest.placement.ep_size
    facts = {
        "base model": _code(config.base_model) if config.base_model else "not named in the adapter",
        "source": _source(manifest),
        "experts": f"{placement.num_experts} in each of {len(manifest.modules)} modules",
        "placement": f"{placement.strategy}, {ep_size} expert-parallel rank{'s' * (ep_size > 1)}",
        "LoRA rank": str(max(module.lora_rank for module in manifest.modules.values())),
        "values": f"cast to {manifest.dtype}" if manifest.dtype else "the source's, bit for bit",
        "written by": f"lorashard {manifest.lorashard_version}",
    }
    table = "\n".join(f"| {fact} | {value} |" for fact, value in facts.items())
    body = f"""---
{_metadata(config)}
---

# {name}

A LoRA adapter of a Mixture-of-Experts model, split into one file for each expert-parallel rank by
lorashard.

| | |
|---|---|
{table}

## Files

{_files(manifest)}

## Serve it

With lorashard's vLLM plugin, which `{INSTALL}` in {INSTALL_IN}
installs into the Python environment of vLLM:

```
lorashard pull {shlex.quote(place)} --node-ranks 0-{ep_size - 1} -o {folder}
vllm serve {_model_argument(config)} {_serve_flags(placement)} --enable-lora \\
  --max-lora-rank {_max_lora_rank(manifest, config)} --lora-modules {adapter_name(name)}=./{folder}
```

With `--ep-rank K` or `--node-ranks A-B`, `pull` fetches only what one pod or node needs.
`lorashard reshard` redistributes the experts over another number of ranks, and `lorashard merge`
restores the source adapter{" (not possible here: the values were cast)" if manifest.dtype else ""}.
"""
    return _sealed(body)


def format_adapter_card(config: LoraConfig, place: str) -> str:
    """The card of a plain adapter that was made from shards."""
    base = _code(config.base_model) if config.base_model else "not named in the adapter"
    return _sealed(f"""---
{_metadata(config, library="peft")}
---

# {last_name(place)}

A LoRA adapter of a Mixture-of-Experts model, in PEFT's format.

| | |
|---|---|
| base model | {base} |
| LoRA rank | {max(config.lora_rank, *config.rank_pattern.values(), 0)} |
| written by | lorashard {__version__} |

`lorashard split {shlex.quote(place)} --ep-size N` writes one file for each of N expert-parallel ranks.
""")


def is_untouched(card: str) -> bool:
    """Whether format_card wrote `card` and nobody has edited it since."""
    seal = _SEAL.search(card)
    return seal is not None and seal[1] == _digest(card[: seal.start()].removesuffix("\n"))


def _sealed(body: str) -> str:
    return f"{body}\n<!-- written by lorashard push, {_digest(body)} -->\n"


def _metadata(config: LoraConfig, library: str = "lorashard") -> str:
    """The card's fields as YAML. The Hub refuses a base_model that is not a Hub id."""
    from huggingface_hub import ModelCardData

    named: dict[str, Any] = {}
    if config.base_model and _HUB_ID.fullmatch(config.base_model):
        named = {"base_model": config.base_model, "base_model_relation": "adapter"}
    tags = ["lora", "mixture-of-experts"]
    if library == "lorashard":
        tags += ["expert-parallel", "vllm"]
    return ModelCardData(library_name=library, tags=tags, **named).to_yaml().strip()


def _digest(body: str) -> str:
    return blake3(body.encode()).hexdigest()[:16]


def _code(text: str) -> str:
    """Text from an adapter's config as code, made safe for a Markdown table."""
    return "`" + re.sub(r"[`|\s]+", " ", text).strip()[:200] + "`"


def _source(manifest: Manifest) -> str:
    source = manifest.source
    if source.repo is None:
        return "an adapter that was not on the Hub"
    return f"{_code(source.repo)} at {_code(source.revision or 'main')}"


def _files(manifest: Manifest) -> str:
    rows = ["| file | experts | size in bytes |", "|---|---|---|"]
    num_experts = ["none", *(str(len(experts)) for experts in manifest.placement.ranks)]
    for (name, file), count in zip(manifest.files.items(), num_experts):
        rows.append(f"| `{name}` | {count} | {file.digest.size_bytes:,} |")
    return "\n".join(rows)


def _serve_flags(placement: Placement) -> str:
    flags = f"-tp {placement.ep_size} --enable-expert-parallel"
    if placement.strategy == "round_robin":
        flags += " --expert-placement-strategy round_robin"
    return flags


def _max_lora_rank(manifest: Manifest, config: LoraConfig) -> int:
    """The smallest `--max-lora-rank` that vLLM accepts and that fits the adapter."""
    modules = (module.lora_rank for module in manifest.modules.values())
    needed = max(config.lora_rank, *config.rank_pattern.values(), *modules)
    return smallest_max_lora_rank(needed)


def _model_argument(config: LoraConfig) -> str:
    named = config.base_model
    return named if named and re.fullmatch(r"[\w./-]+", named) else "MODEL"
