"""`lorashard split`: adapters -> shard directories.

In: adapters, here or remote, and a `SplitRequest`. Out: a shard directory for each.
Read `pipeline` first: one split, stage by stage. `run` runs it once or finds the work done
(`resume`); `batch` runs it for many adapters, which `selection` finds.
"""
