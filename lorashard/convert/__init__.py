"""`lorashard convert`: a shard directory -> a plain PEFT adapter, per expert or fused.

In: an `AdapterLayout` and the shards. Out: the tensors and the `adapter_config.json` of a PEFT adapter.
Read `convert` first, then `target`, which decides every byte; `assemble` reads them together.
"""
