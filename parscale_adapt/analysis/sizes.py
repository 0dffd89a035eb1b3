"""Numbers of parameters for reading."""


def size_text(num_params: float) -> str:
    """A number of parameters for reading, such as 1.57B."""
    for scale, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if num_params >= scale:
            return f"{num_params / scale:.2f}{unit}"
    return f"{num_params:.0f}"
