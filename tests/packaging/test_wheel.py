"""The wheel: what is in it, and that it works where there is no checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from parscale_adapt import __version__


ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "parscale_adapt"

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("wheel")]


def run(*command, **options):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that nothing is left in the checkout, by the setuptools of this environment, offline."""
    root = tmp_path_factory.mktemp("wheel")
    source = root / "source"
    shutil.copytree(PACKAGE, source / "parscale_adapt", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests" / "core", source / "tests")  # as in the checkout: must not be packed
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", root)
    run(sys.executable, "-m", "pip", "wheel", *options, source)
    return next(root.glob("*.whl"))


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """A fresh environment with the wheel; what it depends on is seen in this one's packages, behind its own."""
    root = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", root)
    python = root / "bin" / "python"
    own = Path(run(python, "-I", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # A line of a .pth file goes to the end of the path, and .pth files over there, such as the checkout's, aren't read.
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    return root


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    files = (path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    kinds = {".py", ".pyc", ".csv", ".typed", ".html", ".css", ".js", ".svg"}
    assert {path.suffix for path in PACKAGE.rglob("*") if path.is_file()} <= kinds
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = f"parscale_adapt-{__version__}.dist-info"
        assert f"Version: {__version__}\n" in archive.read(f"{metadata}/METADATA").decode()
    packed = {name for name in names if not name.startswith(f"{metadata}/")}
    assert packed == {str(path.relative_to(ROOT)) for path in files}
    assert {"parscale_adapt/py.typed", "parscale_adapt/analysis/published_points.csv"} <= packed
    assert {
        f"parscale_adapt/page/static/{name}" for name in ("index.html", "page.css", "app.js", "icon.svg")
    } <= packed
    assert f"{metadata}/licenses/LICENSE" in names


def test_a_model_is_wrapped_trained_saved_and_loaded(environment, tmp_path):
    smoke = shutil.copy(Path(__file__).with_name("smoke.py"), tmp_path)
    out = run(environment / "bin" / "python", "-I", smoke, tmp_path, cwd=tmp_path)
    assert out.splitlines()[-1] == __version__


def test_the_command_is_installed(environment, tmp_path):
    command = environment / "bin" / "parscale"
    assert run(command, "--version", cwd=tmp_path) == f"parscale_adapt {__version__}\n"
    assert "1.82x" in run(command, "predict", "--model", "1.6B", cwd=tmp_path)  # from the points in the wheel
