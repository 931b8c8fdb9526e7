"""`lorashard verify`: a shard directory -> what is wrong with it.

`verify` holds a directory against its manifest; `reference/` holds it against the source adapter, with
code that shares nothing with the code that wrote it.
"""
