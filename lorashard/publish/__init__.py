"""A trainer's ranks -> one shard directory, without a gathered adapter in between -> vLLM servers.

In: on each rank the tensors that it has, and a barrier. Out: the shard directory that `split` would
write of the gathered adapter, byte for byte. Read `writer` first. `parts` says who has what,
`gathered` what the adapter would be, `places` where its bytes go. `peft_models` and `megatron` give a
writer what a trainer's rank has.

`publisher` takes such directories, one for each version, and has servers load and unload them.
"""
