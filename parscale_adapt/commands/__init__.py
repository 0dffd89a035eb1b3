"""The commands of `parscale`, one module each."""
