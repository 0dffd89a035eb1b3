"""Shared fixtures: everything runs offline on tiny random models, and on the CPU unless it is marked `gpu`."""

import os


os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    OPENBLAS_NUM_THREADS="1",
    **({} if os.environ.get("PARSCALE_TEST_GPU") == "1" else {"CUDA_VISIBLE_DEVICES": ""}),
)

import pathlib
import sys

import pytest
import torch
from support.recipe_runs import Material, RecipeServer


torch.set_num_threads(1)  # tiny models on few cores


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if "recipes" in item.fixturenames:
            item.add_marker(pytest.mark.slow)


def pytest_runtest_setup(item):
    if item.get_closest_marker("browser") and os.environ.get("PARSCALE_TEST_PAGE") != "1":
        pytest.skip("`make test-page` runs them in a browser")
    if item.get_closest_marker("gpu"):
        if os.environ.get("PARSCALE_TEST_GPU") != "1":
            pytest.skip("GPUs are hidden, `make test-gpu` shows them")
        if not torch.cuda.is_available():
            pytest.skip("torch finds no GPU")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden():
    """The folder of reference data of the published model."""
    return pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    """A tiny backbone and small text files for the recipes."""
    return Material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="session")
def recipes(tmp_path_factory):
    """Runs recipes, each in a process of its own."""
    server = RecipeServer(tmp_path_factory.mktemp("recipes"))
    yield server
    server.close()


@pytest.fixture
def parscale(monkeypatch, capsys):
    """Runs the command in this process and gives back exit code, output and errors."""
    from parscale_adapt.cli import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["parscale", *map(str, arguments)])
        capsys.readouterr()  # what fixtures wrote
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
