"""The code that travels with a checkpoint is the package's own, complete, and of one piece."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support.tiny_models import tiny_model, with_streams

import parscale_adapt
from parscale_adapt.models import bundle
from parscale_adapt.version import __version__


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    with_streams(tiny_model()).merge_and_unload().save_pretrained(folder)
    return (folder / bundle.CODE_FILE).read_text()


def definitions(source):
    tree = ast.parse(source)
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_it_imports_torch_and_transformers_and_nothing_of_the_package(code):
    imported = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.partition(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch", "transformers"}


@pytest.mark.parametrize(
    "module",
    ["core/streams", "core/aggregator", "core/prefix", "hf/attention", "hf/cache", "hf/decoder", "models/streamed"],
)
def test_functions_and_classes_are_those_of_the_package_word_for_word(code, module):
    source = (bundle._PACKAGE / f"{module}.py").read_text()
    code = re.sub(rf"\b_{Path(module).stem}(_\w+)", r"\1", code)  # private names that another module has as well
    assert definitions(source)
    for name, node in definitions(source).items():
        assert ast.get_source_segment(source, node) in code, name


def test_it_begins_with_where_it_comes_from(code):
    docstring = ast.get_docstring(ast.parse(code))
    assert f"parscale_adapt {__version__}" in docstring
    assert "attention, " in docstring
    assert "SPDX-License-Identifier: Apache-2.0" in code
    assert '"""Mix the streams:' in code


def test_every_name_in_it_is_defined(code, tmp_path):
    (tmp_path / "code.py").write_text(code)
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F"]
    done = subprocess.run([*command, "code.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_it_registers_its_attention_under_a_name_of_its_own(code):
    assert code.count('STREAMS = f"{__name__}."') == 1
    assert 'STREAMS = "parscale_"' not in code


def joined(monkeypatch, tmp_path, **modules):
    for name, source in modules.items():
        path = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
    monkeypatch.setattr(bundle, "_PACKAGE", tmp_path)
    monkeypatch.setattr(bundle, "_ENTRY", "modeling")
    names = bundle.ClassNames("t", "C", "M", "L", "SC", "SM", "SL")
    return bundle.joined_code(names, {"SC": "a.b", "SM": "a.c", "SL": "a.c"}, "1")


def test_private_names_that_clash_are_told_apart(monkeypatch, tmp_path):
    code = joined(
        monkeypatch,
        tmp_path,
        modeling='"""Doc."""\nimport os\nfrom .first import f\nfrom .second import g\n\nh = f() + g()\n',
        first="def _value():\n    return 1\n\n\ndef f():\n    return _value()\n",
        second="def _value():\n    return 10\n\n\ndef g():\n    # comes along\n    return _value()\n",
    )
    body = code[: code.index("class C(")].replace("from a.b import SC\n", "").replace("from a.c import SL, SM\n", "")
    values = {}
    exec(body, values)
    assert values["h"] == 11
    assert "# comes along" in body


def test_imports_are_followed_into_folders_and_back(monkeypatch, tmp_path):
    code = joined(
        monkeypatch,
        tmp_path,
        **{
            "modeling": "from .core.first import f\n\nh = f()\n",
            "core.first": "from .second import g\nfrom ..root import ten\n\n\ndef f():\n    return g() + ten\n",
            "core.second": "def g():\n    return 1\n",
            "root": "ten = 10\n",
        },
    )
    body = code[: code.index("class C(")].replace("from a.b import SC\n", "").replace("from a.c import SL, SM\n", "")
    values = {}
    exec(body, values)
    assert values["h"] == 11


def test_two_modules_of_one_name_are_refused(monkeypatch, tmp_path):
    modules = {"modeling": "from .core.other import f\nfrom .hf.other import g\n"}
    modules |= {"core.other": "def f(): ...\n", "hf.other": "def g(): ...\n"}
    with pytest.raises(ValueError, match="named 'other'"):
        joined(monkeypatch, tmp_path, **modules)


@pytest.mark.parametrize(
    ("modeling", "other", "message"),
    [
        ("from .other import f\n\ndef f(): ...\n", "def f(): ...\n", "`f` is defined in other and modeling"),
        ("from .other import f as g\n", "def f(): ...\n", "modeling.py, line 1: an import that can't be joined"),
        ("from . import other\n", "", "modeling.py, line 1: an import that can't be joined"),
        ("def f():\n    import os\n", "", "modeling.py, line 2: an import that can't be joined"),
    ],
)
def test_what_can_not_be_joined_is_refused(monkeypatch, tmp_path, modeling, other, message):
    with pytest.raises(ValueError, match=message):
        joined(monkeypatch, tmp_path, modeling=modeling, other=other)


def test_a_changed_registration_is_noticed(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"config_view\.py must hold .* once"):
        joined(monkeypatch, tmp_path, modeling="from .config_view import S\n", config_view='S = "parscale_"\n')


def test_code_package_and_project_have_one_version():
    project = tomllib.loads((bundle._PACKAGE.parent / "pyproject.toml").read_text())
    assert parscale_adapt.__version__ == __version__ == project["project"]["version"]
