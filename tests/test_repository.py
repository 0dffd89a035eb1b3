"""Rules of the code base that no single module can hold: one-way imports, sizes, what must not appear."""

import ast
import graphlib
import pathlib
import sys

import pytest


ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "parscale_adapt"
MODULES = sorted(PACKAGE.rglob("*.py"))
FOLDERS_OF_SCRIPTS = ("recipes", "benchmarks", "scripts", "vllm_plugin/parscale_vllm")
SCRIPTS = sorted(path for folder in FOLDERS_OF_SCRIPTS for path in (ROOT / folder).rglob("*.py"))

# Which folder may import which: of every pair the second may import the first, never the other way.
FOLDERS = (
    ("core", "hf"),
    ("hf", "models"),
    ("models", "tuner"),
    ("tuner", "training"),
    ("tuner", "checkpoints"),
    ("tuner", "analysis"),
    ("tuner", "serving"),
    ("tuner", "evaluation"),
    ("data", "training"),
    ("data", "commands"),
    ("checkpoints", "training"),
    ("checkpoints", "serving"),
    ("data", "evaluation"),
    ("checkpoints", "evaluation"),
    ("training", "commands"),
    ("checkpoints", "commands"),
    ("analysis", "commands"),
    ("serving", "commands"),
    ("training", "page"),
    ("analysis", "page"),
    ("serving", "page"),
    ("page", "commands"),
    ("evaluation", "commands"),
)
LEAVES = (
    "deferred",
    "files",
    "terminal",
    "version",
)  # may be imported from everywhere, and import nothing of the package
WITHOUT_PEFT = ("core", "hf", "models")
MAX_LINES_PER_FILE, MAX_LINES_PER_FUNCTION, MAX_ARGUMENTS = 350, 60, 6
# Functions whose signature a library demands: typer makes an option of every parameter of a command.
PROTOCOLS = {
    "commands/cost.py": {"cost"},
    "commands/diagnose.py": {"diagnose"},
    "commands/export.py": {"export"},
    "commands/fit_law.py": {"fit_law"},
    "commands/inspect_data.py": {"inspect_data"},
    "tuner/attaching.py": {"_create_and_replace"},  # PEFT calls it by position and by keyword
}


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
    source = "import os\nfrom .. import version\nfrom ..tuner.config import X\nfrom . import rows\ndef f():\n  import torch.nn"
    fake = type("File", (), {"name": path.name, "read_text": lambda self: source, "relative_to": path.relative_to})()
    assert list(imports_of(fake)) == [
        "os",
        "parscale_adapt.version",
        "parscale_adapt.tuner.config",
        "parscale_adapt.data.rows",
        "torch.nn",
    ]


def folder_of(name):
    """`core` of `parscale_adapt.core.streams`; modules of the root are rooms of their own."""
    return name.split(".")[1] if "." in name else ""


def importable_from(folder):
    """The folders below a folder, as the pairs say."""
    below = {lower for lower, upper in FOLDERS if upper == folder}
    return below.union(*(importable_from(lower) for lower in below))


def modules_in(*folders):
    return [path for path in MODULES if folder_of(module_name(path)) in folders]


def ids(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [path for path in MODULES if path.parent != PACKAGE], ids=ids)
def test_folders_import_one_way(path):
    folder = folder_of(module_name(path))
    assert {folder_of(name) for name in own_imports(path)} - {folder, *LEAVES} <= importable_from(folder)


def test_every_folder_has_its_place():
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == {
        folder for pair in FOLDERS for folder in pair
    }


def test_only_what_starts_the_package_and_leaves_lie_in_its_root():
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", "cli", *LEAVES}


@pytest.mark.parametrize("path", modules_in("core"), ids=ids)
def test_core_imports_torch_only(path):
    outside = {name.split(".")[0] for name in imports_of(path)} - set(sys.stdlib_module_names)
    assert outside <= {"torch", "parscale_adapt"}


@pytest.mark.parametrize("path", modules_in(*WITHOUT_PEFT), ids=ids)
def test_there_is_no_peft_below_the_tuner(path):
    assert not [imported for imported in imports_of(path) if imported.split(".")[0] == "peft"]


def test_the_tests_mirror_the_package():
    folders = {folder for pair in FOLDERS for folder in pair}
    assert folders <= {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()}


def test_no_imports_run_in_a_circle():
    graph = {module_name(path): own_imports(path) for path in MODULES}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(NAMES)


@pytest.mark.parametrize("path", MODULES + SCRIPTS, ids=ids)
def test_files_and_functions_are_short(path):
    source = path.read_text()
    assert source.count("\n") <= MAX_LINES_PER_FILE
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < MAX_LINES_PER_FUNCTION, node.name


def arguments_of(function):
    """Names of the parameters that a caller may give, without `self` and what `*` and `**` collect."""
    arguments = function.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def functions_with_many_arguments(path):
    functions = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return {function.name for function in functions if len(arguments_of(function)) > MAX_ARGUMENTS}


@pytest.mark.parametrize("path", MODULES + SCRIPTS, ids=ids)
def test_functions_have_few_arguments_unless_a_library_demands_them(path):
    known = PROTOCOLS.get(str(path.relative_to(PACKAGE)), set()) if path in MODULES else set()
    assert functions_with_many_arguments(path) == known


@pytest.mark.parametrize("forbidden", ["import pickle", "pickle.load", "torch.load(", "num_virtual_tokens"])
def test_what_must_not_appear_does_not(forbidden):
    assert not [str(path) for path in MODULES + SCRIPTS if forbidden in path.read_text()]
