"""The mathematics of parallel streams, in plain torch."""
