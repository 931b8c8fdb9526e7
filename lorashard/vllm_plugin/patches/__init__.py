"""What is changed in vLLM, and how: records in `table`, applied by `apply`.

Read `table` first.
"""
