"""`lorashard reshard`: a shard directory -> one with another placement, bit for bit.

`reshard` carries out what `moves` decides.
"""
