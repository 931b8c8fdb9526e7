"""What runs here: vLLM's configuration, modules and names, as plain values; and what is refused of them.

Read `live` first.
"""
