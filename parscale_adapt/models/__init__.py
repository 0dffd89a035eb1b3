"""Models that own their streams: standalone checkpoints, and the layout that the authors published."""

import transformers  # noqa: F401  (registers the method before a module of this folder runs, see `deferred`)
