"""The version of this package, which adapters and checkpoints carry."""

__version__ = "0.1.0"
