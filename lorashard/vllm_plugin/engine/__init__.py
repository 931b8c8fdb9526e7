"""The running engine: vLLM's configuration, modules and names as plain values, and what is refused.

In: vLLM's objects. Out: `LiveExperts`, `EngineFacts`, names, and refusals. Read `live` first.
"""
