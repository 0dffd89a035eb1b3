"""Rules of the code base that no single module can hold: one-way imports, sizes, what must not appear."""

import ast
import graphlib
import pathlib

import pytest


ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "parscale_adapt"
MODULES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted(path for folder in ("recipes", "benchmarks") for path in (ROOT / folder).rglob("*.py"))

# Every core module may import those before it. `qwen2_parscale` stands beside the PEFT method.
CORE = (
    "version",
    "bundle",
    "streams",
    "aggregator",
    "prefix",
    "transforms",
    "layout",
    "config_view",
    "joined",
    "varlen",
    "attention",
    "masks",
    "cache",
    "decoder",
    "paged",
    "modeling",
    "observer",
    "probe",
    "standalone",
    "fingerprint",
    "projections",
    "registration",
    "shared_lora",
    "config",
    "layers",
    "linear_layers",
    "start",
    "state",
    "refusals",
    "tuner",
    "grow",
    "qwen2_parscale",
)
WITHOUT_PEFT = CORE[: CORE.index("registration")]
MAX_LINES_PER_FILE, MAX_LINES_PER_FUNCTION = 400, 70


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(path) for path in MODULES}


def imports_of(path):
    """Absolute names of everything that a file imports, deferred imports included."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                submodule = f"{source}.{alias.name}"
                yield submodule if submodule in NAMES else source


def own_imports(path):
    return {name for name in imports_of(path) if name in NAMES}


def test_the_reader_of_imports_resolves_every_form(tmp_path):
    path = PACKAGE / "data" / "example.py"
    source = "import os\nfrom .. import tuner\nfrom ..config import X\nfrom . import rows\ndef f():\n  import torch.nn"
    fake = type("File", (), {"name": path.name, "read_text": lambda self: source, "relative_to": path.relative_to})()
    assert list(imports_of(fake)) == [
        "os",
        "parscale_adapt.tuner",
        "parscale_adapt.config",
        "parscale_adapt.data.rows",
        "torch.nn",
    ]


@pytest.mark.parametrize("name", CORE)
def test_a_core_module_imports_only_core_modules_before_it(name):
    allowed = {f"parscale_adapt.{earlier}" for earlier in CORE[: CORE.index(name)]}
    assert own_imports(PACKAGE / f"{name}.py") <= allowed


def test_the_list_of_core_modules_is_complete():
    found = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__", "cli"}
    assert found == set(CORE)


def test_importing_the_package_imports_the_core_only():
    assert own_imports(PACKAGE / "__init__.py") <= {f"parscale_adapt.{name}" for name in CORE}


@pytest.mark.parametrize("name", WITHOUT_PEFT)
def test_the_mathematics_does_not_know_peft(name):
    assert not [imported for imported in imports_of(PACKAGE / f"{name}.py") if imported.split(".")[0] == "peft"]


def test_no_imports_run_in_a_circle():
    graph = {module_name(path): own_imports(path) for path in MODULES}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(NAMES)


@pytest.mark.parametrize("path", MODULES + SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    source = path.read_text()
    assert source.count("\n") <= MAX_LINES_PER_FILE
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < MAX_LINES_PER_FUNCTION, node.name


@pytest.mark.parametrize("forbidden", ["import pickle", "pickle.load", "torch.load(", "num_virtual_tokens"])
def test_what_must_not_appear_does_not(forbidden):
    assert not [str(path) for path in MODULES + SCRIPTS if forbidden in path.read_text()]
