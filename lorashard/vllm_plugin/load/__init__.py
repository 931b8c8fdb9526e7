"""An adapter -> vLLM's LoRAModel, with the experts that this rank holds.

In: a shard directory or a plain adapter, and the live layers of `engine`. Out: pinned host tensors in
the form that `set_lora` takes.
Read `loader` first.
"""
