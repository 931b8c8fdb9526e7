"""The command line: one module for each command, named after it.

In: a command's options. Out: one call of the core, and what it returns on stdout, notes and progress
on stderr. Read `app` first; `options` has what commands share, `render` prints.
Whatever is slow to import is imported inside the commands, so that `lorashard --help` starts at once.
"""
