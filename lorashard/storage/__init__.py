"""Bytes, on this machine and elsewhere. Knows nothing of adapters.

In: what a user named as a path, a Hub id or a URL. Out: small files whole, headers, `ByteSource`s to
read large ones from, and directories that appear whole or not at all.
Read `local` and `remote` first, then `staging`.
"""
