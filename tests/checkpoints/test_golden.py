"""The published checkpoints of the golden data through import and both exports."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.fresh_reader import Job, read_in_fresh_process
from transformers import AutoConfig, AutoModelForCausalLM

from parscale_adapt.checkpoints.exporting import export_adapter
from parscale_adapt.checkpoints.importing import import_published


pytestmark = pytest.mark.xdist_group("checkpoints-golden")  # one fixture for all

CASES = ("p1", "p2", "p4_left_padded")


@pytest.fixture(scope="module")
def imported(golden, tmp_path_factory):
    """Folder with an imported `adapter` and its exports `published` and `standalone`, by case."""
    folders = {case: tmp_path_factory.mktemp(case) for case in CASES}
    for case, folder in folders.items():
        import_published(str(golden / case), folder / "adapter")
        export_adapter(str(folder / "adapter"), folder / "published", format="published")
        export_adapter(str(folder / "adapter"), folder / "standalone")
    return folders


@pytest.fixture(scope="module")
def seen(golden, imported, tmp_path_factory):
    """What a process without parscale_adapt saw of the standalone exports."""
    jobs = []
    for case, folder in imported.items():
        expected = load_file(golden / case / "expected.safetensors")
        inputs = {key: expected[key] for key in ("input_ids", "attention_mask", "position_ids")}
        num_prompt_tokens = inputs["input_ids"].shape[1]
        num_tokens = {
            "greedy": expected["generate.greedy"].shape[1] - num_prompt_tokens,
            "beams": expected["generate.beam3"].shape[1] - num_prompt_tokens,
        }
        options = {"attn_implementation": "eager"}  # as in the published run
        jobs.append(Job(folder / "standalone", inputs, num_tokens=num_tokens, options=options))
    return dict(zip(imported, read_in_fresh_process(jobs, tmp_path_factory.mktemp("scratch"))))


@pytest.mark.parametrize("case", CASES)
def test_the_published_export_holds_the_same_tensors_and_configuration(golden, imported, case):
    original, exported = golden / case, imported[case] / "published"
    before, after = (load_file(folder / "model.safetensors") for folder in (original, exported))
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in before)
    fields, written = (json.loads((folder / "config.json").read_text()) for folder in (original, exported))
    written.pop("transformers_version")
    assert written.items() <= fields.items()
    # What is left out are settings of generation and classification at their defaults.
    needed = {"parscale_n", "parscale_n_tokens", "parscale_attn_smooth", "rope_theta", "torch_dtype", "model_type"}
    assert needed <= written.keys()


@pytest.mark.parametrize("case", CASES)
def test_a_second_import_gives_the_same_adapter(imported, tmp_path, case):
    import_published(str(imported[case] / "published"), tmp_path / "again")
    before, after = (
        load_file(f / "adapter_model.safetensors") for f in (imported[case] / "adapter", tmp_path / "again")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    configs = [(f / "adapter_config.json").read_text() for f in (imported[case] / "adapter", tmp_path / "again")]
    assert configs[0] == configs[1]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_clean_process_computes_what_the_published_code_computed(golden, seen, case):
    expected = load_file(golden / case / "expected.safetensors")
    facts, outputs = seen[case]
    assert facts["problems"] == {}
    assert facts["tied"]
    visible = expected["attention_mask"].bool()
    torch.testing.assert_close(outputs["logits"][visible], expected["logits"][visible], atol=1e-5, rtol=0)
    assert torch.equal(outputs["greedy"], expected["generate.greedy"])
    assert torch.equal(outputs["beams"], expected["generate.beam3"])


@pytest.mark.parametrize("case", CASES)
def test_the_imported_adapter_computes_what_the_published_code_computed(golden, imported, case):
    backbone = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(imported[case] / "adapter"))
    model = PeftModel.from_pretrained(backbone, imported[case] / "adapter")
    expected = load_file(golden / case / "expected.safetensors")
    inputs = {key: expected[key] for key in ("input_ids", "attention_mask", "position_ids")}
    visible = expected["attention_mask"].bool()
    with torch.no_grad():
        logits = model(**inputs).logits
    torch.testing.assert_close(logits[visible], expected["logits"][visible], atol=1e-5, rtol=0)
