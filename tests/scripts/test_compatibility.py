"""Twenty architectures through every check of scripts/compatibility.py, and the script itself: that its checks notice
what they say, that nothing that fails is listed as working, and that the document is whole."""

import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn


ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
DOCUMENT = ROOT / "docs" / "compatibility.md"

# Key-value heads x size (key/value) of the prefixes and how many attention modules hold one, from the tiny
# configurations: 4 heads of 8 in 32, two key-value heads where the architecture groups queries, two layers of each kind.
PREFIXES = {
    "llama": {"2 x 8": 2},
    "opt": {"4 x 8": 2},
    "gpt_bigcode": {"1 x 8": 2},
    "deepseek_v3": {"4 x 12/6": 2},
    "gemma2": {"2 x 8": 4},
    "gemma3_text": {"2 x 8": 4},
    "gpt_oss": {"2 x 8": 4},
    "gpt2": {"4 x 8": 2},
    "gpt_neox": {"4 x 8": 2},
    "phi3": {"2 x 8": 2},
    "olmo2": {"2 x 8": 2},
    "mixtral": {"2 x 8": 2},
    "qwen3_moe": {"2 x 8": 2},
    "qwen3_next": {"2 x 8": 2},
    "lfm2": {"2 x 8": 2},
    "falcon_h1": {"2 x 8": 2},
    "jamba": {"2 x 8": 2},
    "llama4_text": {"2 x 8": 4},
    "gemma3n_text": {"2 x 8": 4},
    "bart": {"4 x 8": 2},
}
EAGER_ONLY = ("gemma2", "gpt_oss")  # soft caps and sinks
NOT_APPLICABLE = {
    "bart": {"left-padding": "left-padding changes the plain backbone's logits"},  # it can't be told positions
}


@pytest.fixture(scope="module", autouse=True)
def _scripts_can_be_imported():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield


@pytest.mark.slow
@pytest.mark.parametrize("model_type", PREFIXES)
def test_every_property_holds(model_type):
    from compatibility_checks import checks_of
    from compatibility_reports import examine

    report = examine(model_type)
    assert not report.refused
    assert [(outcome.check, outcome.remark) for outcome in report.failures] == []
    assert report.works
    assert report.prefixes == PREFIXES[model_type]
    assert report.implementations == (["eager"] if model_type in EAGER_ONLY else ["sdpa", "eager"])
    found = {(outcome.check, outcome.implementation) for outcome in report.outcomes}
    checks = checks_of("CAUSAL_LM")
    assert found == {(check, implementation) for check in checks for implementation in report.implementations}
    remarks = {outcome.check: outcome.remark for outcome in report.outcomes if outcome.remark}
    assert remarks == NOT_APPLICABLE.get(model_type, {})


@pytest.mark.slow
@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"])
def test_every_property_holds_for_other_heads(task):
    from compatibility_checks import checks_of
    from compatibility_reports import examine
    from tiny_architectures import OTHER_TASKS

    names = [name for name in OTHER_TASKS if name.endswith(f":{task}")]
    assert len(names) == 10
    for name in names:
        report = examine(name)
        assert [(outcome.check, outcome.remark) for outcome in report.failures] == []
        assert report.works, name
        assert report.implementations == ["sdpa", "eager"]
        assert {outcome.check for outcome in report.outcomes} == set(checks_of(task))
        assert [outcome for outcome in report.outcomes if outcome.remark] == []


@pytest.mark.parametrize(
    ("model_type", "sentence"),
    [
        ("mamba", "MambaForCausalLM has no attention that streams can reach"),
        ("deepseek_v32", "DeepseekV32Attention picks single keys"),
    ],
)
def test_a_refused_architecture_is_reported_with_the_sentence_of_the_package(model_type, sentence):
    from compatibility_reports import examine

    report = examine(model_type)
    assert report.refused.startswith(sentence)
    assert not report.works
    assert report.outcomes == []


def test_an_architecture_that_cannot_be_built_is_reported_with_the_reason():
    from compatibility_reports import examine

    report = examine("gemma4_assistant")
    assert report.impossible.startswith("It drafts for a larger model")
    assert not report.works


def hook_layer(model, change):
    """Let `change(output, layer, keyword arguments)` take the place of the output of Llama's first layer."""
    layer = next(module for name, module in model.named_modules() if name.endswith("model.layers.0"))
    layer.register_forward_hook(lambda layer, args, kwargs, output: change(output, layer, kwargs), with_kwargs=True)
    return model


def by_position(output, layer, kwargs):
    return output + 0.1 * torch.arange(output.shape[1])[:, None]


def by_row(output, layer, kwargs):
    return output + 0.1 * torch.arange(output.shape[0])[:, None, None]


def by_later_tokens(output, layer, kwargs):
    return output + output.mean(1, keepdim=True)


def by_other_rows(output, layer, kwargs):
    return output + output.mean(0, keepdim=True)


def while_caching(output, layer, kwargs):
    return output.flip(-1) if kwargs.get("past_key_values") is not None else output


def while_checkpointing(output, layer, kwargs):
    return output * 1.5 if layer.gradient_checkpointing else output


def with_stuck_beams(case):
    def forget_reordering(model, args, output):
        if output.past_key_values is not None:
            output.past_key_values.reorder_cache = lambda beams: None

    case.model.base_model.model.register_forward_hook(forget_reordering)


def with_a_silent_prefix(case):
    model = case.adapted()
    prefix = next(parameter for name, parameter in model.named_parameters() if "parscale_prefix_v" in name)
    prefix.register_hook(lambda gradient: torch.cat([gradient[:2], torch.zeros_like(gradient[2:])]))
    case.adapted = lambda: model


def with_a_change_after_saving(case):
    save, prefix = case.model.save_pretrained, next(p for n, p in case.model.named_parameters() if "prefix_v" in n)

    def save_and_change(folder):
        save(folder)
        nn.init.normal_(prefix)

    case.model.save_pretrained = save_and_change


def in_adapted(change):
    def apply(case):
        adapted = case.adapted
        case.adapted = lambda: hook_layer(adapted(), change)

    return apply


def in_model(change):
    return lambda case: hook_layer(case.model, change)


DEFECTS = {
    "brute force": in_model(lambda output, layer, kwargs: output * 1.01),
    "adapter off": in_model(lambda output, layer, kwargs: output * (1 + 1e-6)),
    "causality": in_model(by_later_tokens),
    "batch": in_model(by_other_rows),
    "left-padding": in_model(by_position),
    "pooling": in_model(by_position),
    "default cache": in_model(while_caching),
    "greedy": in_model(while_caching),
    "beams": with_stuck_beams,
    "gradients": with_a_silent_prefix,
    "checkpointing": in_adapted(while_checkpointing),
    "save and load": with_a_change_after_saving,
    "equal prefixes": in_adapted(by_row),
}


def outcome_of(check, *changes):
    from compatibility_case import Case
    from compatibility_checks import CHECKS
    from compatibility_reports import run_check

    case = Case("llama:SEQ_CLS" if check == "pooling" else "llama", "sdpa")
    for change in changes:
        change(case)
    return run_check(check, CHECKS[check], case)


def test_every_check_has_a_defect_that_it_must_notice():
    from compatibility_checks import CHECKS

    assert set(DEFECTS) == set(CHECKS)


@pytest.mark.parametrize("check", DEFECTS)
def test_a_check_fails_where_the_property_is_broken(check):
    assert outcome_of(check).status == "works"
    outcome = outcome_of(check, DEFECTS[check])
    assert outcome.status == "fails"
    assert outcome.remark


@pytest.mark.parametrize(
    ("check", "change"),
    [
        ("causality", by_later_tokens),
        ("batch", by_other_rows),
        ("left-padding", by_position),
        ("pooling", by_position),
        ("greedy", while_caching),
        ("beams", while_caching),
    ],
)
def test_a_property_that_the_backbone_lacks_does_not_apply(check, change):
    in_both = (lambda case: hook_layer(case.backbone, change), in_model(change))
    outcome = outcome_of(check, *in_both)
    assert outcome.status == "not applicable"
    assert "plain backbone" in outcome.remark


def test_what_the_brute_force_does_not_cover_is_an_error_and_not_a_success(tmp_path):
    """An attention module with a prefix that never runs through the patched function would make the oracle idle."""
    from compatibility_case import Case
    from compatibility_oracle import logits_by_brute_force

    case = Case("llama", "sdpa")
    case.model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="2 attention modules never called their eager function"):
        logits_by_brute_force(case.fresh_backbone("sdpa"), tmp_path, case.plain)


def broken(case):
    raise KeyError("nothing there")


def test_a_failing_check_is_listed_as_failing_and_ends_the_command_with_an_error(monkeypatch, tmp_path, capsys):
    import compatibility
    from compatibility_reports import examine

    checks = {"sound": lambda case: "", "broken": broken}
    monkeypatch.setattr(compatibility, "examine_apart", lambda name, implementations: examine(name, ["sdpa"], checks))
    output = tmp_path / "compatibility.md"
    monkeypatch.setattr(sys, "argv", ["compatibility.py", "--only", "llama", "mamba", "--output", str(output)])
    with pytest.raises(SystemExit, match="A property fails for llama"):
        compatibility.main()
    document = output.read_text()
    assert "| llama | LlamaForCausalLM | broken | sdpa | KeyError: 'nothing there' (test_compatibility.py:" in document
    assert "| [fail in a property](#fail-in-a-property) | 1 | 1 |" in document
    assert "| work in every property that applies | 0 | 0 |" in document
    assert re.search(r"\| It has no attention that streams can reach: [^|]* \| mamba \|", document)
    assert f"transformers {transformers.__version__}" in document


def test_remarks_are_listed_once_and_numbered():
    from compatibility import render
    from compatibility_reports import Outcome, Report

    lacking = Outcome("left-padding", "sdpa", "not applicable", "it changes")
    limited = Outcome("greedy", "sdpa", "works", "only alone")
    reports = [
        Report(
            "gpt2", "GPT2LMHeadModel", implementations=["sdpa"], prefixes={"4 x 8": 2}, outcomes=[lacking, limited]
        ),
        Report("opt", "OPTForCausalLM", implementations=["sdpa"], layers=["full"], outcomes=[lacking]),
    ]
    lines = render(reports, "command").splitlines()
    assert "| gpt2 | GPT2LMHeadModel |  | 2: 4 x 8 | sdpa | *not* left-padding (1), greedy (2) |" in lines
    assert "| opt | OPTForCausalLM | full |  | sdpa | *not* left-padding (1) |" in lines
    assert lines[-2:] == ["1. It changes.", "2. Only alone."]


def crash(model_type, implementations):
    os._exit(7)


def hang(model_type, implementations):
    time.sleep(600)


@pytest.mark.slow
def test_a_crash_and_a_hang_are_failures_of_that_architecture_only():
    from compatibility_reports import examine_apart

    crashed = examine_apart("llama", ["sdpa"], examiner=crash)
    hung = examine_apart("llama", ["sdpa"], timeout_seconds=1, examiner=hang)
    (failure,) = crashed.failures
    assert failure.remark == "its process ended with exit code 7"
    (failure,) = hung.failures
    assert failure.remark == "it took more than 1 seconds"
    assert examine_apart("mamba", ["sdpa"]).refused


def test_an_unknown_model_type_is_refused_before_anything_runs(monkeypatch, capsys):
    import compatibility

    monkeypatch.setattr(sys, "argv", ["compatibility.py", "--only", "llama", "lama"])
    with pytest.raises(SystemExit) as stop:
        compatibility.main()
    assert stop.value.code == 2
    assert f"--only names lama, which transformers {transformers.__version__} doesn't map" in capsys.readouterr().err


def document_rows():
    """The cells of every line of a table in the document."""
    lines = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_the_document_says_for_which_version_it_was_made_and_then_covers_every_type():
    from tiny_architectures import MODEL_TYPES

    version = re.search(r"Generated by this command with transformers ([\d.]+)", DOCUMENT.read_text())[1]
    if version != transformers.__version__:
        pytest.skip(f"docs/compatibility.md was made with transformers {version}, not {transformers.__version__}")
    mentioned = [name for row in document_rows() for cell in (row[0], row[-1]) for name in cell.split(", ")]
    assert set(MODEL_TYPES) <= set(mentioned)


def test_the_document_counts_what_it_lists_and_at_least_a_hundred_work():
    rows = document_rows()
    works, fails, refused, impossible, total = (int(row[1]) for row in rows[2:7])
    assert works + fails + refused + impossible == total
    assert works >= 100
    headings = [row[0] for row in rows]
    start = headings.index("model type")
    width = len(rows[start])
    listed = [row for row in rows[start + 2 : start + 2 + works] if len(row) == width]
    assert len(listed) == works
    assert set(PREFIXES) <= {row[0] for row in listed}
