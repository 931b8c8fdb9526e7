"""What `lorashard doctor` says about this Python, vLLM's flags and an adapter.

In: the environment, flags and paths. Out: a `Report`, which the command line prints.
Read `diagnosis` first: it decides on what `survey` and `adapter_survey` find, and opens nothing.
"""
