"""A tiny checkpoint that a server can chat with: GLM's special words, bytes, and long positions."""

import json
import shutil
from pathlib import Path

from tests.gpu.reference import VOCABULARY

MAX_MODEL_LEN = 131072
# What GLM's chat template and vLLM's parsers for it (glm45) know by name.
SPECIAL = (
    "<|pad|>", "<|endoftext|>", "<|end|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>",
    "<|assistant|>", "<|observation|>", "<think>", "</think>", "<tool_call>", "</tool_call>",
    "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
)  # fmt: skip
_HIDDEN_FROM_TEXT = SPECIAL[:9]
# GLM-4.5's, less what it says about tools and earlier reasoning.
CHAT_TEMPLATE = """[gMASK]<sop>
{%- if tools %}<|system|>
{{ tools | tojson }}{% endif %}
{%- for message in messages %}<|{{ message.role }}|>
{{ message.content }}{% endfor %}
{%- if add_generation_prompt %}<|assistant|>
{%- if enable_thinking is defined and not enable_thinking %}
<think></think>{% endif %}{% endif %}"""


def save_chat_tokenizer(directory: Path) -> None:
    """One token for each special word and each byte; the other ids are words that nobody writes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"<|unused_{token}|>" for token in range(len(words), VOCABULARY)]
    ids = {word: token for token, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in _HIDDEN_FROM_TEXT])
    tokenizer.add_tokens(
        [AddedToken(word, special=False) for word in SPECIAL if word not in _HIDDEN_FROM_TEXT]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|endoftext|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)


def make_chat_checkpoint(source: Path, target: Path) -> Path:
    """`source` with that tokenizer and as many positions as users ask for; returns `target`."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    save_chat_tokenizer(target)
    config = json.loads((target / "config.json").read_text())
    config["max_position_embeddings"] = MAX_MODEL_LEN
    (target / "config.json").write_text(json.dumps(config, indent=1))
    return target
