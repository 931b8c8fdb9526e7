"""`python -m lorashard`."""

from lorashard.cli.app import main

main()
