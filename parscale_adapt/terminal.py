"""Where tables for people are printed."""

from rich.console import Console


WIDTH_WITHOUT_TERMINAL = 160


def console() -> Console:
    """Standard output as it is now; text is printed as it stands, without markup.

    Piped output has no width of its own, and figures broken over lines are hard to read and to cut, so it gets 160 columns.
    """
    plain = Console(highlight=False, markup=False)
    return plain if plain.is_terminal else Console(highlight=False, markup=False, width=WIDTH_WITHOUT_TERMINAL)
