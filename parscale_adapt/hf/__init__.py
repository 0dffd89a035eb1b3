"""Streams inside models of transformers: attention, masks, caches, the door of a decoder, and what a backbone is."""

import transformers  # noqa: F401  (registers the method before a module of this folder runs, see `deferred`)
