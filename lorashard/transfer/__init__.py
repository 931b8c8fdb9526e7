"""`lorashard pull` and `push`: shard directories from and to the Hub, object storage and other URLs.

In: a shard directory here or elsewhere, and a place. Out: the same files there, as far as they are
needed, each proven against its digest. Read `pull` first.
"""
