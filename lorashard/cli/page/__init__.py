"""`--html`: what `plan` and `inspect` found, as one page that needs nothing else.

In: the documents of `--json`, and the maps of `inspect.picture`. Out: HTML text, in a file. `markup` escapes
whatever comes from an adapter; `document` is the page to read first.
"""
