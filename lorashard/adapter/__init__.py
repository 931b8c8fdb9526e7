"""What a PEFT adapter says, and what it means.

In: `adapter_config.json` and the names and shapes of its tensors. Out: an `AdapterLayout`: each expert's
lora_A and lora_B, wherever the writer of the file put them.
Read `layout` first; `keys` knows how writers spell names, `containers` how they shape tensors.
"""
