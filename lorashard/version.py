"""The release. Here alone, so that everything can import it and nothing is imported with it."""

__version__ = "0.1.0"
