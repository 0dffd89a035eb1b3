"""The version of this package, which adapters and checkpoints carry, and those of transformers that it is tested with."""

__version__ = "0.1.0"
TESTED_TRANSFORMERS = ">=5.20,<5.24"


def is_tested(transformers_version: str) -> bool:
    """Whether a version of transformers lies in [`TESTED_TRANSFORMERS`]."""
    lowest, end = (tuple(map(int, bound.lstrip("<>=").split("."))) for bound in TESTED_TRANSFORMERS.split(","))
    return lowest <= tuple(map(int, transformers_version.split(".")[:2])) < end
