"""Adapters and exports that released versions wrote, reloaded by the newest code, compute what they computed then.

Run as a script, this file loads exports where `parscale_adapt` can't be imported; see [`read_without_the_package`].
"""

import importlib
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


ARTIFACTS = pathlib.Path(__file__).resolve().parent
CASES = sorted(file.parent for file in ARTIFACTS.glob("*/*/expected.safetensors"))
STANDALONE = [case for case in CASES if (case / "export" / "modeling_parscale.py").is_file()]
# Every version and case that is kept, so that none vanishes unseen.
KEPT = {
    "0.1.0": {
        "aggregator_dynamic",
        "aggregator_mean",
        "aggregator_static",
        "bitfit",
        "lora",
        "merged",
        "modules_to_save",
        "one_stream",
        "prefix",
        "prefix_gemma3",
        "published",
        "reparameterized",
        "shared_lora",
        "standalone",
        "tokens",
        "train_backbone",
    },
}
GENERATION = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def _package():
    """Imported late, since the process that reads standalone exports runs this file without the package."""
    importlib.import_module("parscale_adapt")


@torch.no_grad()
def compute(model, inputs):
    """Logits `[B, T, vocabulary]` and greedily continued ids `[B, T + 8]`."""
    return {"logits": model(**inputs).logits, "generated": model.generate(**inputs, **GENERATION)}


def read_inputs(case):
    expected = load_file(case / "expected.safetensors")
    return {name: expected[name] for name in ("input_ids", "attention_mask")}


def load(case):
    """The model of a case."""
    if (case / "export").is_dir():
        return AutoModelForCausalLM.from_pretrained(case / "export", trust_remote_code=case in STANDALONE).eval()
    config = json.loads((case / "adapter" / "adapter_config.json").read_text())
    backbone = AutoModelForCausalLM.from_pretrained(case.parent / config["base_model_name_or_path"])
    return PeftModel.from_pretrained(backbone, case / "adapter").eval()


def check_outputs(outputs, case):
    expected = load_file(case / "expected.safetensors")
    visible = expected["attention_mask"].bool()
    # Logits reach 6; other matrix kernels round them differently by up to 2e-5.
    torch.testing.assert_close(outputs["logits"][visible], expected["logits"][visible], atol=1e-4, rtol=0)
    assert torch.equal(outputs["generated"], expected["generated"])


def case_name(case):
    return f"{case.parent.name}-{case.name}"


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_the_newest_code_computes_what_the_version_computed(case):
    check_outputs(compute(load(case), read_inputs(case)), case)


class Blocked:
    """Makes the import of this package fail, wherever it may be installed."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "parscale_adapt":
            raise ImportError("parscale_adapt is blocked here")


def read_without_the_package(folder):
    """Write what every standalone export computes to `folder`."""
    sys.meta_path.insert(0, Blocked)
    torch.set_num_threads(1)
    for case in STANDALONE:
        save_file(compute(load(case), read_inputs(case)), folder / case_name(case))


@pytest.fixture(scope="module")
def read_alone(tmp_path_factory):
    """A folder with what standalone exports compute in a process that has no parscale_adapt."""
    folder = tmp_path_factory.mktemp("alone")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(folder / "modules")
    command = [sys.executable, "-P", __file__, str(folder)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.xdist_group("regression-alone")  # one fixture for all
@pytest.mark.parametrize("case", STANDALONE, ids=case_name)
def test_standalone_exports_need_no_package(read_alone, case):
    check_outputs(load_file(read_alone / case_name(case)), case)


def test_no_case_is_lost():
    found = {}
    for case in CASES:
        found.setdefault(case.parent.name, set()).add(case.name)
    assert found == KEPT


if __name__ == "__main__":
    read_without_the_package(pathlib.Path(sys.argv[1]))
