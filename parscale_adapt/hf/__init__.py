"""Streams inside models of transformers: attention, masks, caches, the door of a decoder, and what a backbone is."""
