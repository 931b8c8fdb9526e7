"""`lorashard convert`: a shard directory -> a plain PEFT adapter, per expert or fused.

In: an `AdapterLayout` and the shards. Out: the tensors and the `adapter_config.json` of a PEFT adapter.
Read `convert` first, then `plan`, which decides every byte; `tensor_blocks` reads them from the shards.
"""
