"""A scaling law from the paper's points, or from what `parscale fit-law --json` wrote."""

import json
from pathlib import Path

from .fit import fit_law
from .runs import PUBLISHED_DATASETS, published_runs
from .scaling_law import ScalingLaw, law_from_dict


def load_law(source: str) -> ScalingLaw:
    """The law that `--law` names.

    Raises:
        ValueError: it names no published data set and no file with a law.
    """
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
