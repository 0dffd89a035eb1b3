"""Names and registration that wait: the package is light, and known to PEFT and transformers in any order of imports."""

import importlib
import importlib.util
import inspect
import os
import pickle
import subprocess
import sys
import threading
from importlib import resources

import pytest
from support.published_checkpoints import save_backbone, save_published
from support.tiny_models import tiny_model, with_streams

import parscale_adapt
from parscale_adapt.deferred import import_after


def run(program, *arguments):
    """Run a program in a fresh process and give back what it prints."""
    command = [sys.executable, "-W", "ignore::FutureWarning", "-c", program, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A backbone, an adapter on it, the adapter's pickled configuration and a published checkpoint."""
    root = tmp_path_factory.mktemp("deferred")
    tiny_model().save_pretrained(root / "backbone")
    model = with_streams(type(tiny_model()).from_pretrained(root / "backbone"), 2)
    model.save_pretrained(root / "adapter")
    (root / "config.pkl").write_bytes(pickle.dumps(model.peft_config["default"]))
    save_backbone(root / "tied")
    save_published(root / "published", root / "tied", num_streams=2)
    return root


LOAD_ADAPTER = """
import sys
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM
backbone = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/backbone")
print(type(PeftModel.from_pretrained(backbone, sys.argv[1] + "/adapter").base_model).__name__)
print(AutoConfig.for_model("qwen2_parscale").model_type)
"""


@pytest.mark.parametrize(
    "first",
    [
        "import parscale_adapt, peft, transformers",
        pytest.param("import peft, parscale_adapt", marks=pytest.mark.slow),
        pytest.param("import transformers, parscale_adapt, peft", marks=pytest.mark.slow),
        pytest.param("from parscale_adapt import ParScaleConfig", marks=pytest.mark.slow),
        pytest.param("from parscale_adapt import StreamTrainer", marks=pytest.mark.slow),
        pytest.param("import parscale_adapt; from transformers import Trainer", marks=pytest.mark.slow),
        # Modules that others of the same folder need, each as the first to ask for transformers or PEFT.
        pytest.param("import parscale_adapt.hf.attention", marks=pytest.mark.slow),
        pytest.param("import parscale_adapt.models.streamed", marks=pytest.mark.slow),
        pytest.param("import parscale_adapt.tuner.shared_lora", marks=pytest.mark.slow),
        pytest.param("import pickle; pickle.load(open(sys.argv[1] + '/config.pkl', 'rb'))", marks=pytest.mark.slow),
    ],
)
def test_adapters_load_in_any_order_of_imports(folder, first):
    assert run(f"import sys; {first}" + LOAD_ADAPTER, folder) == ["ParScaleModel", "qwen2_parscale"]


@pytest.mark.slow
def test_published_checkpoints_load_without_peft(folder):
    program = (
        "import sys, parscale_adapt\n"
        "from transformers import AutoModelForCausalLM\n"
        "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/published')).__name__, 'peft' in sys.modules)"
    )
    assert run(program, folder) == ["Qwen2ParScaleForCausalLM", "False"]


@pytest.mark.slow
def test_a_spawned_process_knows_the_method(folder):
    """The child has none of the parent's imports; the configuration that it is handed brings them."""
    program = (
        "import multiprocessing, sys, parscale_adapt\n"
        "from peft import PeftConfig\n"
        "config = PeftConfig.from_pretrained(sys.argv[1] + '/adapter')\n"
        "with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "    print(pool.apply(getattr, [config, 'num_streams']))\n"
        "    print(pool.apply(PeftConfig.from_pretrained, [sys.argv[1] + '/adapter']) == config)\n"
    )
    assert run(program, folder) == ["2", "True"]


def test_every_public_name_is_there_and_nothing_else():
    for name in parscale_adapt.__all__:
        assert getattr(parscale_adapt, name) is vars(parscale_adapt)[name]
    assert set(parscale_adapt.__all__) <= set(dir(parscale_adapt))
    with pytest.raises(AttributeError, match="module 'parscale_adapt' has no attribute 'ParscaleConfig'"):
        _ = parscale_adapt.ParscaleConfig


def test_the_import_is_light():
    heavy = ("torch", "transformers", "peft", "numpy")
    assert run(f"import sys, parscale_adapt; print(*({set(heavy)!r} & set(sys.modules)))") == []


@pytest.mark.slow
def test_the_callback_comes_without_plots_and_without_a_trainer():
    program = (
        "import sys; from parscale_adapt import ParScaleArguments, StreamStatisticsCallback\n"
        "print(*({'matplotlib', 'trl', 'rich'} & set(sys.modules)))"
    )
    assert run(program) == []


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Writes modules that exist for one test: `trigger`, a package, and `follower`, imported after it."""
    monkeypatch.syspath_prepend(tmp_path)
    meta_path = list(sys.meta_path)
    (tmp_path / "trigger").mkdir()
    (tmp_path / "trigger" / "__init__.py").write_text("ready = True\n")
    (tmp_path / "trigger" / "part.py").write_text("")
    (tmp_path / "follower.py").write_text("from trigger import ready\n")
    yield tmp_path
    sys.meta_path[:] = meta_path
    for name in ("trigger", "trigger.part", "follower"):
        sys.modules.pop(name, None)


def is_waiting():
    return any(getattr(finder, "trigger", None) == "trigger" for finder in sys.meta_path)


@pytest.mark.parametrize("name", ["trigger", "trigger.part"])
def test_the_follower_is_imported_right_after_its_trigger(modules, name):
    import_after("trigger", "follower")
    assert "follower" not in sys.modules
    importlib.import_module(name)
    assert "follower" in sys.modules
    assert not is_waiting()


def test_the_follower_is_imported_at_once_if_its_trigger_is_there(modules):
    importlib.import_module("trigger")
    import_after("trigger", "follower")
    assert "follower" in sys.modules
    assert not is_waiting()


def test_asking_whether_the_trigger_is_installed_imports_nothing_and_forgets_nothing(modules):
    import_after("trigger", "follower")
    assert importlib.util.find_spec("trigger").origin == str(modules / "trigger" / "__init__.py")
    assert not {"trigger", "follower"} & set(sys.modules)
    importlib.import_module("trigger")
    assert "follower" in sys.modules


def test_the_trigger_is_the_module_that_it_would_have_been(modules):
    import_after("trigger", "follower")
    trigger = importlib.import_module("trigger")
    assert type(trigger.__loader__).__module__ == "_frozen_importlib_external"
    assert trigger.__spec__.loader is trigger.__loader__
    assert inspect.getsource(trigger) == "ready = True\n"
    assert resources.files(trigger).joinpath("part.py").is_file()
    (modules / "trigger" / "__init__.py").write_text("ready = 'again'\n")
    assert importlib.reload(trigger).ready == "again"


def test_a_trigger_may_replace_itself(modules):
    """As transformers does, by a lazy module."""
    (modules / "trigger" / "__init__.py").write_text(
        "import sys, types\nlazy = types.ModuleType(__name__)\nlazy.ready, lazy.__spec__ = 'lazy', __spec__\n"
        "sys.modules[__name__] = lazy\n"
    )
    import_after("trigger", "follower")
    assert importlib.import_module("trigger").ready == "lazy"
    assert sys.modules["follower"].ready == "lazy"


def test_what_is_asked_for_twice_happens_once(modules):
    import_after("trigger", "follower")
    import_after("trigger", "follower")
    assert sum(getattr(finder, "trigger", None) == "trigger" for finder in sys.meta_path) == 1


def test_an_error_of_the_follower_is_shown_each_time(modules):
    (modules / "follower.py").write_text("raise RuntimeError('the real reason')\n")
    import_after("trigger", "follower")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the real reason"):
            importlib.import_module("trigger")
    (modules / "follower.py").write_text("from trigger import ready\nmended = True\n")
    importlib.invalidate_caches()
    importlib.import_module("trigger")
    assert sys.modules["follower"].mended


def test_a_trigger_that_fails_may_be_tried_again(modules):
    (modules / "trigger" / "__init__.py").write_text("raise OSError('not now')\n")
    import_after("trigger", "follower")
    with pytest.raises(OSError, match="not now"):
        importlib.import_module("trigger")
    assert "follower" not in sys.modules
    (modules / "trigger" / "__init__.py").write_text("ready = True  # this time\n")
    importlib.invalidate_caches()
    importlib.import_module("trigger")
    assert "follower" in sys.modules


def test_in_the_middle_of_its_trigger_the_follower_names_the_circle(modules):
    """No user can be there, but a module that PEFT imports could; today's Python says what is wrong."""
    body = "from parscale_adapt.deferred import import_after\nimport_after('trigger', 'follower')\nready = True\n"
    (modules / "trigger" / "__init__.py").write_text(body)
    with pytest.raises(ImportError, match="partially initialized module 'trigger'"):
        importlib.import_module("trigger")


def test_another_thread_that_is_importing_the_trigger_is_waited_for(modules):
    started, go_on = threading.Event(), threading.Event()
    sys.modules["trigger_events"] = type(sys)("trigger_events")
    sys.modules["trigger_events"].started, sys.modules["trigger_events"].go_on = started, go_on
    body = "from trigger_events import go_on, started\nstarted.set()\ngo_on.wait(20)\nready = True\n"
    (modules / "trigger" / "__init__.py").write_text(body)
    importer = threading.Thread(target=importlib.import_module, args=("trigger",))
    registrar = threading.Thread(target=import_after, args=("trigger", "follower"))
    importer.start()
    assert started.wait(20)
    registrar.start()
    go_on.set()
    importer.join(20)
    registrar.join(20)
    del sys.modules["trigger_events"]
    assert sys.modules["follower"].ready
