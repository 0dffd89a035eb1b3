"""Checkpoints with streams in transformers' own server, and a terminal chat over adapters on one backbone."""
