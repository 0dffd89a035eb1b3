"""The local page of `parscale page`: chat, streams, law and runs in a browser."""
