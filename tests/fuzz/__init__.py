"""Coverage-guided fuzzing of what strangers write: `python -m tests.fuzz TARGET --seconds N`.

`targets` lists what is fuzzed, `outcome` says what counts as a finding, `mutators` makes inputs that
get past the first check, `engine` runs one target under atheris, and `record` keeps the figures that
docs/security.md shows. Every input worth keeping is in `corpus/` and is run by pytest without atheris.
"""
