"""The `--law` option: a scaling law from the paper's points, or from what `parscale fit-law --json` wrote."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer


if TYPE_CHECKING:
    from ..analysis.scaling_law import ScalingLaw

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


def load_law(source: str) -> "ScalingLaw":
    """The law that `--law` names.

    Raises:
        ValueError: it names no published data set and no file with a law.
    """
    from ..analysis.fit import fit_law
    from ..analysis.runs import PUBLISHED_DATASETS, published_runs
    from ..analysis.scaling_law import law_from_dict

    if source in PUBLISHED_DATASETS:
        return fit_law(published_runs(source), num_bootstrap=0).law
    if not Path(source).is_file():
        raise ValueError(
            f"`--law {source}` is neither {' nor '.join(PUBLISHED_DATASETS)} nor a file that fit-law --json wrote"
        )
    try:
        values = json.loads(Path(source).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{source} is not JSON ({error}): give a file that fit-law --json wrote") from error
    if not isinstance(values, dict):
        raise ValueError(f"{source} holds no scaling law: give a file that fit-law --json wrote")
    return law_from_dict(values)
