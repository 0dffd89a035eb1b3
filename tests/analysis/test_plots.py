"""Pictures leave matplotlib as a notebook has set it up."""

import os
import pathlib
import subprocess
import sys
from itertools import pairwise

import pytest
from matplotlib.figure import Figure

import parscale_adapt
from parscale_adapt.analysis.plots import label_line_ends


PACKAGE = pathlib.Path(parscale_adapt.__file__).parent

DRAWING = """
import sys
from pathlib import Path

import matplotlib

before = dict(matplotlib.rcParams)
from parscale_adapt.analysis import diagnostics_plots, plots
from parscale_adapt.analysis.diagnostics import LayerSimilarity, ReducedMixture, StreamDiagnostics
from parscale_adapt.analysis.fit import fit_law
from parscale_adapt.analysis.runs import read_runs
from parscale_adapt.training.plots import plot_curve

half = [[1.0, 0.5], [0.5, 1.0]]
removal = [ReducedMixture([0, 1], None, 2.0), ReducedMixture([1], 0, 2.1)]
found = StreamDiagnostics(
    2, 100, [0.4, 0.6], [0.3, 0.7], 0.67, 0.97, [2.2, 2.1], 2.0, 2.05, 2.04, 0.0, 0.9, half,
    [LayerSimilarity("final", half, 0.5)], removal,
)
folder = Path(sys.argv[1])
plots.save(plots.plot_fit(fit_law(read_runs("pile", None), num_bootstrap=0), "pile"), folder / "law.png")
plots.save(diagnostics_plots.plot_diagnostics(found, "tiny"), folder / "streams.png")
plot_curve([{"loss": 3.0, "num_tokens": 10, "stream_weight/0": 0.4}], folder / "loss.png", "loss", "loss")
print("pyplot", "matplotlib.pyplot" in sys.modules)
print("backend", matplotlib.get_backend())
print("settings", dict(matplotlib.rcParams) == before)
"""


@pytest.mark.slow
def test_drawing_changes_no_global_state(tmp_path):
    environment = {**os.environ, "MPLBACKEND": "svg"}
    command = [sys.executable, "-c", DRAWING, str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-3:] == ["pyplot False", "backend svg", "settings True"]
    for name in ("law.png", "streams.png", "loss.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_no_module_asks_for_global_state():
    sources = {path: path.read_text() for path in PACKAGE.rglob("*.py")}
    for word in ("pyplot", "matplotlib.use(", "rcParams"):
        assert [str(path) for path, source in sources.items() if word in source] == []


def test_names_of_lines_that_end_together_stay_within_the_axes():
    axes = Figure().subplots()
    axes.set_ylim(1, 2)
    label_line_ends(axes, 0.5, [(1.01, f"P = {count}", "black") for count in (1, 2, 4, 8)])
    heights = [text.xy[1] for text in axes.texts]
    assert len(heights) == 4
    assert 1 <= min(heights) < max(heights) <= 2
    assert all(higher - lower >= 0.06 - 1e-9 for lower, higher in pairwise(sorted(heights)))
