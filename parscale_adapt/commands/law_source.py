"""The `--law` option, and what to do before numpy is imported."""

import os
from typing import Annotated

import typer


LawOption = Annotated[
    str,
    typer.Option(
        "--law",
        help="Scaling law: stack-v2-python or pile (fitted to the paper's points), or a file of fit-law --json.",
    ),
]


def use_one_blas_thread() -> None:
    """To be called before numpy and scipy are imported, whose OpenBLAS makes its threads then.

    A fit solves systems of four unknowns: more threads only wait for each other, for many times as long as the fit
    takes where other programs keep the cores busy.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
