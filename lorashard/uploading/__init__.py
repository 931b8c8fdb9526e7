"""A finished shard directory -> a repository on the Hub, or a folder at another URL.

In: a local directory that is known to be right, and a target. Out: the same files there, and a model
card. Read `upload` first. `push` and publishing use it.
"""
