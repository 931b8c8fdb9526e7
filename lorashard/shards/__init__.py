"""The directory that `split` writes: its files, its placement, its plan, its manifest.

In: an `AdapterLayout` and a `Placement`. Out: a `ShardPlan`, every byte of every file before one is
written, and the `Manifest` that describes them; or both of them again, from a directory.
Read `plan` first, then `directory`. `replan` checks a directory for the verbs that read one, `tensors`
reads its tensors for the Python API.
"""
