"""The code that travels with a checkpoint is the package's own, complete, and of one piece."""

import ast
import json
import os
import subprocess
import sys
import tomllib

import pytest
from support.tiny_models import tiny_model, with_streams

import parscale_adapt
from parscale_adapt.models import bundle
from parscale_adapt.version import TESTED_TRANSFORMERS, __version__, is_tested


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


# What a new version of transformers may not rename without making every checkpoint's code unusable.
NAMES_AT_THE_TOP = {
    "transformers": {
        "AttentionInterface",
        "AttentionMaskInterface",
        "Cache",
        "DynamicCache",
        "GenerationConfig",
        "GenerationMixin",
        "PreTrainedConfig",
        "PreTrainedModel",
    },
    "transformers.cache_utils": {"CacheLayerMixin", "LinearAttentionCacheLayerMixin"},
    "transformers.conversion_mapping": {
        "get_checkpoint_conversion_mapping",
        "register_checkpoint_conversion_mapping",
    },
    "transformers.masking_utils": {"ALL_MASK_ATTENTION_FUNCTIONS"},
    "transformers.modeling_utils": {"ALL_ATTENTION_FUNCTIONS"},
    "transformers.models.qwen2.configuration_qwen2": {"Qwen2Config"},
    "transformers.models.qwen2.modeling_qwen2": {"Qwen2ForCausalLM", "Qwen2Model"},
}


def test_it_needs_no_other_names_of_transformers_to_be_imported(code):
    inside_functions = {
        node
        for function in ast.walk(ast.parse(code))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
    }
    found = {}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("transformers"):
            found.setdefault(ast.unparse(node), node)
    functions = {ast.unparse(node) for node in inside_functions if isinstance(node, ast.ImportFrom)}
    at_the_top = [node for text, node in found.items() if text not in functions]
    assert {node.module: {alias.name for alias in node.names} for node in at_the_top} == NAMES_AT_THE_TOP


@pytest.mark.parametrize("module", bundle._modules_in_order(), ids=lambda module: module.name)
def test_functions_and_classes_are_those_of_the_package_word_for_word(code, module):
    assert definitions(module.source)
    assert module.source == (bundle._PACKAGE / f"{module.name.replace('.', '/')}.py").read_text()
    for name, node in definitions(module.source).items():
        assert code.count(ast.get_source_segment(module.source, node)) == 1, name


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


VERSIONS = 'TESTED_TRANSFORMERS = ">=1"\n\n\ndef is_tested(version):\n    return True\n'


def joined(monkeypatch, tmp_path, **modules):
    for name, source in {"version": VERSIONS, **modules}.items():
        path = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
    monkeypatch.setattr(bundle, "_PACKAGE", tmp_path)
    monkeypatch.setattr(bundle, "_ENTRY", "modeling")
    names = bundle.ClassNames("t", "C", "M", "L", "LlamaConfig", "LlamaModel", "LlamaForCausalLM")
    return bundle.joined_code(names, dict.fromkeys(list(vars(names).values())[-3:], "transformers"), "1")


def run(code):
    """What the modules define, without the classes of the checkpoint."""
    values = {}
    exec(code[: code.index("# --- this checkpoint")], values)
    return values


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("def _value():\n    return 1\n", "def _value():\n    return 10\n"),
        ("class _value: ...\n", "_value = 10\n"),
        ("from json import dumps as _value\n", "_value = 10\n"),
        ("import json as _value\n", "import math as _value\n"),
        ("from json import _value\n", "from math import _value\n"),
    ],
)
def test_names_that_mean_two_things_are_refused(monkeypatch, tmp_path, first, second):
    modules = {"modeling": "from .core.first import f\nfrom .hf.second import g\n"}
    modules |= {"core.first": f"{first}\n\ndef f(): ...\n", "hf.second": f"{second}\n\ndef g(): ...\n"}
    with pytest.raises(ValueError, match=r"`_value` means different things in first and second: .*, so rename one"):
        joined(monkeypatch, tmp_path, **modules)


def test_a_name_that_all_import_from_one_place_means_one_thing(monkeypatch, tmp_path):
    modules = {"modeling": "import json\nfrom math import pi\nfrom .other import f\n\nh = f() + pi\n"}
    modules["other"] = (
        "import json\nfrom math import pi\n\n\ndef f():\n    # comes along\n    return json.loads('1')\n"
    )
    code = joined(monkeypatch, tmp_path, **modules)
    assert run(code)["h"] == pytest.approx(4.14159265)
    assert "# comes along" in code
    assert code.count("from math import pi") == 1


def test_imports_from_outside_stay_inside_functions(monkeypatch, tmp_path):
    source = "def f():\n    import json as reader\n    from math import no_such_name, pi\n\n    return reader, pi\n"
    code = joined(monkeypatch, tmp_path, modeling=source)
    assert source in code
    with pytest.raises(ImportError, match="no_such_name"):
        run(code)["f"]()


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
    assert run(code)["h"] == 11


def test_two_modules_of_one_name_are_refused(monkeypatch, tmp_path):
    modules = {"modeling": "from .core.other import f\nfrom .hf.other import g\n"}
    modules |= {"core.other": "def f(): ...\n", "hf.other": "def g(): ...\n"}
    with pytest.raises(ValueError, match="named 'other'"):
        joined(monkeypatch, tmp_path, **modules)


@pytest.mark.parametrize(
    ("modeling", "other", "message"),
    [
        (
            "from .other import f\n\ndef f(): ...\n",
            "def f(): ...\n",
            "`f` means different things in modeling and other",
        ),
        ("from .other import f as g\n", "def f(): ...\n", "modeling.py, line 1: an import that can't be joined"),
        ("from . import other\n", "", "modeling.py, line 1: an import that can't be joined"),
        ("def f():\n    from .other import g\n", "", "modeling.py, line 2: an import that can't be joined"),
        ("if True:\n    import os\n", "", "modeling.py, line 2: an import that can't be joined"),
        ("class C:\n    import os\n", "", "modeling.py, line 2: an import that can't be joined"),
    ],
)
def test_what_can_not_be_joined_is_refused(monkeypatch, tmp_path, modeling, other, message):
    with pytest.raises(ValueError, match=message):
        joined(monkeypatch, tmp_path, modeling=modeling, other=other)


PROJECT = tomllib.loads((bundle._PACKAGE.parent / "pyproject.toml").read_text())["project"]


def test_code_package_and_project_have_one_version():
    assert parscale_adapt.__version__ == __version__ == PROJECT["version"]


def test_code_and_project_name_one_range_of_transformers(code):
    assert f"transformers{TESTED_TRANSFORMERS}" in PROJECT["dependencies"]
    assert f'TESTED_TRANSFORMERS = "{TESTED_TRANSFORMERS}"' in code


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("5.19.2", False),
        ("5.20.0", True),
        ("5.23.9", True),
        ("5.24.0.dev0", False),
        ("5.24", False),
        ("6.0.0rc1", False),
    ],
)
def test_versions_in_the_range(version, expected):
    assert is_tested(version) is expected


READER = """
import json, sys, warnings


class Blocked:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "parscale_adapt":
            raise ImportError("parscale_adapt is blocked here")


sys.meta_path.insert(0, Blocked)
import torch
from transformers.generation import continuous_batching
from transformers.models.qwen2 import modeling_qwen2

transformers = sys.modules["transformers"]  # its own imports put another one there

said = {}


def load(name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = transformers.AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{name}", trust_remote_code=True)
    said[name] = [str(warning.message) for warning in caught if warning.category is UserWarning]
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    return model


assert load("tested").model.config._attn_implementation == type(load("tested")).__module__ + ".sdpa"
transformers.__version__ = "5.24.0"
load("newer")
del continuous_batching.cache.SLIDING_ATTENTION, continuous_batching.cache.group_layers_by_attn_type
del continuous_batching.continuous_api.ContinuousMixin
vars(transformers).pop("ContinuousBatchingConfig", None)
transformers._class_to_module.pop("ContinuousBatchingConfig")
model = load("batching")
try:
    model.init_continuous_batching()
except ImportError as error:
    said["batching"] = str(error)
del transformers.cache_utils.LinearAttentionCacheLayerMixin
try:
    load("renamed")
except ImportError as error:
    said["renamed"] = str(error)
print(json.dumps(said))
"""


@pytest.mark.slow
def test_it_says_one_sentence_outside_of_the_range(tmp_path):
    for name in ("tested", "newer", "batching", "renamed"):
        with_streams(tiny_model()).merge_and_unload().save_pretrained(tmp_path / name)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-P", "-c", READER, tmp_path]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    needed = f"transformers {TESTED_TRANSFORMERS}, got 5.24.0"
    assert said["tested"] == []
    assert said["newer"] == [
        f"The code of this checkpoint was tested with {needed}: if it fails, install a version in that range."
    ]
    assert said["batching"].startswith(
        f"Continuous batching in streams needs {needed}, which has it under other names ("
    )
    assert said["renamed"].startswith(f"The code of this checkpoint needs {needed}, which lacks what it imports (")
    assert "LinearAttentionCacheLayerMixin" in said["renamed"]
    assert said["renamed"].endswith("): install a version in that range.")
