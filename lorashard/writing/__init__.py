"""Carries out a `ShardPlan`: one pass over the source, bounded memory, digests on the way.

In: a plan and a `ByteSource`. Out: the files of the plan, synced, and their BLAKE3 digests.
Read `execute` first.
"""
