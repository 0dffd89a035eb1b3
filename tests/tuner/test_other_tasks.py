"""Other tasks than the causal LM's: streams run in the decoder, and the head, which is trained with them, sees their
mixture. Ten architectures go through the checks of scripts/compatibility.py; here is what PEFT does with the adapters.
"""

import copy
import re

import pytest
import torch
from peft import (
    PeftModel,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    get_peft_model,
)
from safetensors.torch import load_file
from support.oracle import mix_by_hand
from support.quantized import load_in_4bit
from support.tiny_models import random_tokens, tiny_model
from support.tiny_tasks import (
    AUTO_CLASSES,
    HEADLESS,
    TASKS,
    WITH_HEAD,
    change_head,
    in_streams,
    labels_for,
    said,
    tiny_for,
)
from support.traces import traces

from parscale_adapt import ParScaleConfig
from parscale_adapt.tuner.grow import grow_streams


WRAPPERS = {
    "SEQ_CLS": PeftModelForSequenceClassification,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    HEADLESS: PeftModelForFeatureExtraction,
}
HEADS = {"SEQ_CLS": "score", "TOKEN_CLS": "score", "QUESTION_ANS": "qa_outputs"}
in_all_tasks = pytest.mark.parametrize("task", TASKS)
with_a_head = pytest.mark.parametrize("task", WITH_HEAD)
frozen_and_full = pytest.mark.parametrize("train_backbone", [False, True])


@in_all_tasks
def test_the_head_sees_the_mixture_of_what_each_stream_gives_alone(task):
    model = in_streams(task)
    decoder = model.base_model.model.get_decoder()
    seen = []
    aggregator = decoder.parscale.parscale_aggregator["default"]
    aggregator.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    found = said(model)
    ((streams, mixed),) = seen
    assert streams.shape == (3 * 2, 9, 32)
    weights = {f"parscale_aggregator.{name}": p.detach() for name, p in aggregator.named_parameters()}
    torch.testing.assert_close(mixed, mix_by_hand(list(streams.chunk(3)), weights, 0.1), atol=1e-5, rtol=1e-5)
    if task == HEADLESS:
        torch.testing.assert_close(found, mixed)
        return
    head = getattr(model.base_model.model, HEADS[task]).modules_to_save["default"]
    expected = head(mixed)
    torch.testing.assert_close(found, expected[:, -1] if task == "SEQ_CLS" else expected)


@in_all_tasks
@frozen_and_full
def test_what_is_trained_is_what_gets_gradients_and_the_original_head_is_left_alone(task, train_backbone):
    model = in_streams(task, train_backbone=train_backbone).train()
    assert type(model) is WRAPPERS[task]
    output = model(input_ids=random_tokens(), **({} if task == HEADLESS else labels_for(task)))
    (output.last_hidden_state.square().sum() if task == HEADLESS else output.loss).backward()
    for name, parameter in model.named_parameters():
        is_owned = "parscale_" in name or ".modules_to_save." in name
        is_trained = is_owned or (train_backbone and ".original_module." not in name)
        assert parameter.requires_grad == is_trained, name
        assert (parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)) == is_trained, name


@in_all_tasks
@frozen_and_full
@pytest.mark.parametrize("num_streams", [1, 3])
def test_a_saved_adapter_brings_its_head_to_a_backbone_with_another_one(task, train_backbone, num_streams, tmp_path):
    model = in_streams(task, num_streams, train_backbone=train_backbone)
    if train_backbone:
        with torch.no_grad():
            model.get_input_embeddings().weight.add_(0.5)
    model.save_pretrained(tmp_path)
    names = {name.removeprefix("base_model.model.") for name in load_file(tmp_path / "adapter_model.safetensors")}
    heads = {name for name in names if name.startswith(("score", "qa_outputs"))}
    assert bool(heads) == (task in HEADS)
    assert not [name for name in names if "original_module" in name or "modules_to_save" in name]
    backbone = tiny_for(task)
    for name, module in backbone.named_modules():
        if name == HEADS.get(task):
            module.reset_parameters()  # as transformers draws a new head for a causal LM
    loaded = PeftModel.from_pretrained(backbone, tmp_path).eval()
    assert torch.equal(said(loaded), said(model))
    assert type(loaded) is type(model)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert loaded.peft_config["default"].modules_to_save == model.peft_config["default"].modules_to_save
    assert {name.removeprefix("base_model.model.") for name in load_file(again / "adapter_model.safetensors")} == names


@in_all_tasks
def test_adapters_are_switched_and_deleted_with_their_heads(task):
    plain = said(tiny_for(task))
    model = in_streams(task)
    alone = said(model)
    torch.manual_seed(5)
    model.add_adapter("other", ParScaleConfig(task_type=task, num_streams=2, num_prefix_tokens=5, init_std=0.5))
    change_head(model.eval(), "other", seed=7)
    assert torch.equal(said(model), alone)
    model.set_adapter("other")
    assert (said(model) - alone).abs().max() > 0.01
    with model.disable_adapter():
        assert torch.equal(said(model), plain)
    model.set_adapter("default")
    assert torch.equal(said(model), alone)
    model.delete_adapter("other")
    assert torch.equal(said(model), alone)
    assert not [name for name, _ in model.named_parameters() if "other" in name]


@in_all_tasks
def test_one_stream_is_merged_and_several_can_be_told_why_not(task, tmp_path):
    single = in_streams(task, 1, lora={"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False})
    expected = said(single)
    merged = single.merge_and_unload()
    torch.testing.assert_close(said(merged), expected)
    assert type(merged) is type(tiny_for(task))
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(said(AUTO_CLASSES[task].from_pretrained(tmp_path)), said(merged))
    model = in_streams(task)
    before, expected = traces(model), said(model)
    message = f"A standalone checkpoint is a causal LM, got {type(tiny_for(task)).__name__} under the streams: save"
    with pytest.raises(ValueError, match=message):
        model.merge_and_unload()
    assert traces(model) == before
    assert torch.equal(said(model), expected)


@in_all_tasks
def test_unloading_leaves_the_plain_backbone_and_its_configuration(task):
    backbone = tiny_for(task)
    plain, head = said(backbone), copy.deepcopy(getattr(backbone, HEADS.get(task, ""), None))
    unloaded = in_streams(task, model=backbone).unload()
    assert type(unloaded.config).__name__ == "Qwen2Config"
    assert unloaded.config._attn_implementation == "sdpa"
    if head is not None:  # PEFT leaves the trained one
        setattr(unloaded, HEADS[task], head)
    assert torch.equal(said(unloaded), plain)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_sequence_classification_reads_the_last_token_that_is_no_padding(side):
    model = in_streams("SEQ_CLS")
    rows = [random_tokens(1, length, seed=length)[0] for length in (4, 9, 6)]
    alone = torch.cat([said(model, input_ids=row[None]) for row in rows])
    input_ids, mask = torch.zeros(3, 14, dtype=torch.long), torch.zeros(3, 14, dtype=torch.long)
    for number, row in enumerate(rows):
        start = {"left": 14 - len(row), "right": 0, "both": number + 1}[side]
        input_ids[number, start : start + len(row)], mask[number, start : start + len(row)] = row, 1
    torch.testing.assert_close(said(model, input_ids=input_ids, attention_mask=mask), alone, atol=1e-5, rtol=1e-5)
    assert (alone - said(tiny_for("SEQ_CLS"), input_ids=input_ids, attention_mask=mask)).abs().max() > 0.1


@with_a_head
def test_samples_of_one_batch_run_the_streams_and_the_head_of_their_own_adapters(task):
    model = in_streams(task)
    torch.manual_seed(5)
    model.add_adapter("other", ParScaleConfig(task_type=task, num_streams=2, num_prefix_tokens=5, init_std=0.5))
    change_head(model.eval(), "other", seed=7)
    rows, alone = random_tokens(3), {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = said(model, input_ids=rows)
    with model.disable_adapter():
        alone["__base__"] = said(model, input_ids=rows)
    names = ["default", "other", "__base__"]
    found = said(model, input_ids=rows, adapter_names=names)
    for number, name in enumerate(names):
        torch.testing.assert_close(found[number], alone[name][number], atol=1e-5, rtol=1e-5)


def test_streams_grow_with_their_head():
    model = in_streams("SEQ_CLS", 2)
    grow_streams(model, "default", "grown", 4, perturbation=0)
    expected = said(model)
    model.set_adapter("grown")
    torch.testing.assert_close(said(model), expected)


@with_a_head
def test_a_quantized_backbone_trains_streams_and_a_head_in_full_precision(task, tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_for(task, hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "backbone")
    options = {"auto_class": AUTO_CLASSES[task], "full_precision": [HEADS[task]]}
    model = in_streams(task, model=load_in_4bit(tmp_path / "backbone", **options).eval())
    expected = said(model)
    model.train()(input_ids=random_tokens(), **labels_for(task)).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any(f"{HEADS[task]}.modules_to_save" in name for name in trained)
    assert all(p.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in trained.values())
    model.eval().save_pretrained(tmp_path / "adapter")
    backbone = load_in_4bit(tmp_path / "backbone", **options)
    assert torch.equal(said(PeftModel.from_pretrained(backbone, tmp_path / "adapter").eval()), expected)


def test_a_quantized_head_is_refused(tmp_path):
    """transformers leaves the last module in full precision by its name, which a bias hides."""
    pytest.importorskip("bitsandbytes")
    tiny_for("TOKEN_CLS", hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    model = load_in_4bit(tmp_path, auto_class=AUTO_CLASSES["TOKEN_CLS"])
    with pytest.raises(
        ValueError, match=r"a copy of `score`, which is quantized: load .*`llm_int8_skip_modules=\['score'\]`"
    ):
        in_streams("TOKEN_CLS", model=model)


def test_a_model_without_head_changes_its_attention_by_name():
    model = in_streams(HEADLESS)
    expected = said(model)
    model.base_model.model.set_attn_implementation("eager")
    torch.testing.assert_close(said(model), expected)
    model.base_model.model.set_attn_implementation("sdpa")
    assert torch.equal(said(model), expected)


@pytest.mark.parametrize(
    ("make", "fields", "message"),
    [
        (tiny_model, {"task_type": "SEQ_CLS"}, "trains the head classifier or score, which Qwen2ForCausalLM doesn't"),
        (tiny_model, {"task_type": "QUESTION_ANS"}, "load the backbone with `AutoModelForQuestionAnswering`"),
        (lambda: tiny_for("SEQ_CLS"), {}, "Qwen2ForSequenceClassification is not a causal LM with an LM head"),
        (
            lambda: tiny_for("SEQ_CLS"),
            {"task_type": "SEQ_CLS", "init_weights": "tokens"},
            "`init_weights='tokens'` starts from text that the backbone generates, and Qwen2ForSequenceClassification",
        ),
        (
            lambda: tiny_for(HEADLESS),
            {"task_type": HEADLESS, "init_weights": "near_identity"},
            "has no LM head to generate with: use 'normal'",
        ),
    ],
)
def test_a_task_that_does_not_fit_its_backbone_is_refused_and_changes_nothing(make, fields, message):
    backbone = make()
    before = traces(backbone)
    with pytest.raises(ValueError, match=re.escape(message)):
        get_peft_model(backbone, ParScaleConfig(num_streams=2, num_prefix_tokens=3, **fields))
    assert traces(backbone) == before


def test_heads_named_twice_are_trained_and_named_once():
    config = ParScaleConfig(task_type="SEQ_CLS", num_streams=2, num_prefix_tokens=3, modules_to_save=["score"])
    model = get_peft_model(tiny_for("SEQ_CLS"), config)
    assert model.peft_config["default"].modules_to_save == ["score", "classifier"]
    with pytest.raises(ValueError, match="`modules_to_save` names parts of the backbone"):
        ParScaleConfig(task_type="SEQ_CLS", train_backbone=True, modules_to_save=["embed_tokens"])
