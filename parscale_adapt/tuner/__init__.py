"""The PEFT method: configuration, layers, switching, saving and loading."""

import peft  # noqa: F401  (registers the method before a module of this folder runs, see `deferred`)
