"""The version, in a file that needs no imports."""

__version__ = "0.2.0"
