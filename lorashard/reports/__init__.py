"""What `inspect`, `plan` and `doctor` say, as documents: what the commands print with --json.

In: a place and options. Out: plain dicts, or `doctor`'s Report. Nothing is written. Above the verbs,
since `plan` decides as `split` does, and `doctor` asks the vLLM plugin; the command line renders.
"""
