"""`lorashard verify`: a shard directory -> what is wrong with it.

`verify` holds a directory against its manifest; `against` holds it against the source adapter, by means of
`reference/`, whose code shares nothing with the code that wrote it.
"""
