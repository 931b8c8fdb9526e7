"""`lorashard split`: adapters -> shard directories.

Read `pipeline` first: one split, stage by stage. `jobs` says which adapters a batch has and where
their shards go, `resume` what is done already.
"""
