"""Checkpoints in and out: published models, adapters, exports that stand alone."""
