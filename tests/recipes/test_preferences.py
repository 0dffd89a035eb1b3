"""Preference pairs: DPO from new streams and from those that sft.py wrote, and reward models; killed, resumed, refused."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForSequenceClassification, PeftModel
from support.quantized import load_in_4bit
from support.recipe_runs import PROBE, REPOSITORY, check_saved, probe_logits, refusal
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification


RECIPES = ("dpo", "reward")
SAVES = {"save_strategy": "steps", "save_steps": 2}
FROM_ADAPTER = {"num_streams": None, "num_prefix_tokens": None}


@pytest.mark.parametrize("init_weights", ["normal", "tokens", "near_identity", "reparameterized"])
def test_dpo_begins_at_log_2_from_new_streams(recipes, material, init_weights):
    result = recipes.run("dpo", **material.pair_options(init_weights=init_weights, learning_rate=3e-2)).check()
    assert result.losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert abs(result.losses[-1] - math.log(2)) > 1e-4  # it moves
    assert sorted(path.name for path in result.output_dir.iterdir() if path.is_dir()) == [], "the reference was saved"
    check_saved(result)
    heldout = result.metrics["heldout"]
    assert 0 <= heldout["accuracy"] <= 1
    assert heldout["num_pairs"] >= 4
    assert result.metrics["heldout_loss"] != pytest.approx(math.log(2), abs=1e-6)


def test_dpo_begins_at_log_2_beside_a_shared_lora_that_is_trained(recipes, material):
    lora = {
        "r": 2,
        "target_modules": "all-linear",
        "init_lora_weights": False,
    }  # which changes the backbone from the start
    result = recipes.run("dpo", **material.pair_options(lora=json.dumps(lora), learning_rate=1e-2)).check()
    assert result.losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert abs(result.losses[-1] - math.log(2)) > 1e-4
    check_saved(result)


def test_a_reward_model_trains_a_shared_lora_and_its_whole_head(recipes, material):
    lora = json.dumps({"r": 2, "target_modules": "all-linear"})
    result = recipes.run("reward", **material.pair_options(lora=lora, learning_rate=1e-2)).check()
    assert sum("lora_B" in name for name in result.tensors) == 2 * 7  # and none on the head
    assert any(name.endswith("score.weight") for name in result.tensors)
    check_saved(result)


@pytest.mark.parametrize("dpo_full", [False, True], ids=["then_frozen", "then_full"])
@pytest.mark.parametrize("sft_full", [False, True], ids=["frozen", "full"])
def test_dpo_begins_at_log_2_from_what_sft_wrote(recipes, material, tuned, sft_full, dpo_full):
    before = tuned[sft_full].tensors
    start = {"adapter_name_or_path": tuned[sft_full].output_dir, **FROM_ADAPTER}
    result = recipes.run("dpo", **material.pair_options(train_backbone=dpo_full, learning_rate=1e-2, **start)).check()
    assert result.losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert abs(result.losses[-1] - math.log(2)) > 1e-4
    own = {name for name in before if "parscale_" in name}
    assert all(not torch.equal(result.tensors[name], before[name]) for name in own)
    assert bool(result.tensors.keys() - own) == (sft_full or dpo_full)
    if sft_full and not dpo_full:
        assert all(torch.equal(result.tensors[name], before[name]) for name in before.keys() - own)
    check_saved(result)


def test_dpo_trains_all_of_a_backbone_against_one_that_stays(recipes, material):
    result = recipes.run("dpo", **material.pair_options(train_backbone=True, learning_rate=1e-2)).check()
    assert result.losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert abs(result.losses[-1] - math.log(2)) > 1e-3
    check_saved(result)


@pytest.mark.parametrize("train_backbone", [False, True])
def test_log_probabilities_of_the_reference_that_are_computed_before_give_the_same_run(
    recipes, material, train_backbone
):
    options = material.pair_options(train_backbone=train_backbone, learning_rate=1e-2)
    before = recipes.run("dpo", precompute_ref_log_probs=True, **options).check()
    assert before.losses == pytest.approx(recipes.run("dpo", **options).check().losses, abs=1e-5)


def test_a_reward_model_orders_held_out_pairs_and_is_loaded_by_its_card(recipes, material):
    options = material.pair_options(max_steps=40, learning_rate=1e-2, heldout_dataset=material.pairs)
    result = recipes.run("reward", **options).check()
    assert result.metrics["heldout"]["accuracy"] > 0.8
    assert result.metrics["heldout_loss"] < math.log(2)
    assert result.adapter_config["task_type"] == "SEQ_CLS"
    assert [name for name in result.tensors if "score" in name] == ["base_model.model.score.weight"]
    check_saved(result)
    card = (result.output_dir / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "AutoPeftModelForSequenceClassification.from_pretrained" in card
    assert AutoPeftModelForSequenceClassification.from_pretrained(result.output_dir, num_labels=1)(
        PROBE
    ).logits.shape == (1, 1)


@pytest.mark.parametrize("train_backbone", [False, True])
def test_a_reward_model_goes_on_in_another_run(recipes, material, train_backbone):
    first = recipes.run("reward", **material.pair_options(train_backbone=train_backbone)).check()
    options = {"adapter_name_or_path": first.output_dir, "train_backbone": train_backbone, **FROM_ADAPTER}
    again = recipes.run("reward", **material.pair_options(learning_rate=1e-6, max_steps=1, **options)).check()
    assert again.tensors.keys() == first.tensors.keys()
    assert all((again.tensors[name] - first.tensors[name]).abs().max() < 1e-4 for name in first.tensors)
    check_saved(again)


@pytest.mark.parametrize("reward_full", [False, True], ids=["then_frozen", "then_full"])
@pytest.mark.parametrize("sft_full", [False, True], ids=["frozen", "full"])
def test_what_sft_wrote_becomes_a_reward_model(recipes, material, tuned, sft_full, reward_full):
    before = tuned[sft_full].tensors
    options = {"adapter_name_or_path": tuned[sft_full].output_dir, "train_backbone": reward_full, **FROM_ADAPTER}
    result = recipes.run("reward", **material.pair_options(learning_rate=1e-6, max_steps=2, **options)).check()
    own = {name for name in before if "parscale_" in name}
    assert all(0 < (result.tensors[name] - before[name]).abs().max() < 1e-4 for name in own)
    brought = (before.keys() - own) & result.tensors.keys()
    assert bool(brought) == sft_full
    assert all((result.tensors[name] - before[name]).abs().max() < 1e-4 for name in brought)
    assert bool(result.tensors.keys() - own - {"base_model.model.score.weight"}) == (sft_full or reward_full)
    assert "base_model.model.score.weight" in result.tensors
    check_saved(result)


def test_a_reward_model_on_another_backbone_than_its_adapter_s_is_refused(recipes, material, tuned, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(material.backbone)
    model.model.embed_tokens.weight.data += 0.5
    model.save_pretrained(tmp_path)
    material.tokenizer().save_pretrained(tmp_path)
    options = {"adapter_name_or_path": tuned[False].output_dir, "model_name_or_path": tmp_path, **FROM_ADAPTER}
    result = recipes.run("reward", **material.pair_options(**options))
    assert f"does not belong to {tmp_path}: The adapter was trained on another backbone" in refusal(result)


@pytest.mark.parametrize("train_backbone", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(recipes, material, tmp_path, recipe, train_backbone):
    options = material.pair_options(train_backbone=train_backbone, max_steps=6, learning_rate=1e-2, **SAVES)
    whole = recipes.run(recipe, tmp_path / "whole", **options).check()
    killed = recipes.run(recipe, tmp_path / "killed", kill_at_batch=5, **options)
    resumed = recipes.run(recipe, tmp_path / "killed", resume_from_checkpoint=True, **options).check()
    assert killed.exit_code == -9
    batches = [[(one["step"], one["ids"], one["loss"]) for one in run.batches()] for run in (whole, killed, resumed)]
    assert len(batches[0]) == 6
    assert batches[1] == batches[0][:5]
    assert batches[2] == batches[0][4:]
    assert resumed.losses == whole.losses
    assert resumed.metrics["heldout_loss"] == whole.metrics["heldout_loss"]
    assert all(torch.equal(resumed.tensors[name], tensor) for name, tensor in whole.tensors.items())


def test_a_reference_that_changed_is_refused_when_dpo_goes_on(recipes, material, tuned, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for path in tuned[False].output_dir.iterdir():
        (adapter / path.name).write_bytes(path.read_bytes())
    options = material.pair_options(adapter_name_or_path=adapter, **FROM_ADAPTER, **SAVES)
    recipes.run("dpo", tmp_path / "run", kill_at_batch=3, **options)
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    sentence = refusal(recipes.run("dpo", tmp_path / "run", resume_from_checkpoint=True, **options))
    assert f"the content of adapter: {adapter} is another now" in sentence


def test_conversations_are_read_as_pairs(recipes, material, tmp_path):
    rows = [json.loads(line) for line in Path(material.pairs).read_text().splitlines()]
    question = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello."}]
    data = tmp_path / "pairs.jsonl"
    lines = [
        {
            side: [*question, {"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
            for side in ("chosen", "rejected")
        }
        for row in rows
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for recipe in RECIPES:
        recipes.run(recipe, **material.pair_options(dataset_name=data, max_steps=1)).check()


PAIR = {"prompt": "Which?", "chosen": "This.", "rejected": "That."}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            {"prompt": "Which?", "chosen": "This."},
            "row needs `prompt`, `chosen` and `rejected`, or whole conversations",
        ),
        ({"text": "This."}, "it has text (name columns with --prompt_field"),
        (
            {**PAIR, "rejected": "This."},
            "`chosen` and `rejected` are the same answer, from which nothing can be learned",
        ),
        ({**PAIR, "chosen": ""}, "`chosen`: `completion` is empty"),
        ({**PAIR, "rejected": 3}, "`rejected`: `prompt` and `completion` must both hold text"),
        (
            {
                "chosen": [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "a"}],
                "rejected": [{"role": "user", "content": "B?"}, {"role": "assistant", "content": "b"}],
            },
            "answer different questions: all but their last messages must be the same",
        ),
        ({**PAIR, "chosen": "word " * 400}, "none of 4 pairs has at most `max_length` 256 tokens"),
    ],
    ids=["no_rejected", "no_column", "equal", "empty", "number", "questions", "long"],
)
def test_pairs_that_can_not_be_learned_from_are_refused(recipes, material, tmp_path, recipe, row, sentence):
    data = tmp_path / "pairs.jsonl"
    data.write_text((json.dumps(row) + "\n") * 4)
    message = refusal(recipes.run(recipe, **material.pair_options(dataset_name=data)))
    assert sentence in message
    assert str(data) in message


@pytest.mark.parametrize(
    ("recipe", "options", "sentence"),
    [
        ("dpo", {"sync_ref_model": True}, "`sync_ref_model` has no effect in dpo.py, got True: the reference stays"),
        ("dpo", {"truncation_mode": "keep_end"}, "`truncation_mode` has no effect in dpo.py"),
        ("dpo", {"padding_free": True}, "`padding_free` has no effect in dpo.py"),
        ("dpo", {"num_streams": 1}, "one stream on a frozen backbone has nothing to learn"),
        ("reward", {"load_in_4bit": True, "train_backbone": True}, "4-bit weights can't be trained"),
        ("reward", {"dataset_name": None}, "`heldout_dataset` has no effect on the embedded data"),
        ("dpo", {"diversity_weight": 0.1}, "--diversity_weight"),
        ("dpo", {"prefix_learning_rate": -1.0}, "`prefix_learning_rate` must be a positive, finite number"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_that_can_not_work_are_refused(recipes, material, recipe, options, sentence):
    assert sentence in refusal(recipes.run(recipe, **material.pair_options(**options)))


def test_an_adapter_of_another_task_is_refused(recipes, material):
    judge = recipes.run("reward", **material.pair_options(max_steps=1)).check()
    start = {"adapter_name_or_path": judge.output_dir, **FROM_ADAPTER}
    for recipe, options in (("dpo", material.pair_options(**start)), ("sft", material.sft_options(**start))):
        assert "is an adapter for SEQ_CLS, and CAUSAL_LM is trained here" in refusal(recipes.run(recipe, **options))


def test_text_to_start_from_is_refused_for_a_reward_model(recipes, material):
    result = recipes.run("reward", **material.pair_options(init_weights="tokens"))
    assert "Qwen2ForSequenceClassification has no LM head to generate with" in refusal(result, loads_weights=True)


@pytest.mark.parametrize("recipe", RECIPES)
def test_pairs_are_learned_from_over_a_4_bit_backbone(recipes, material, recipe):
    pytest.importorskip("bitsandbytes")
    result = recipes.run(recipe, **material.pair_options(load_in_4bit=True, learning_rate=1e-2)).check()
    batches = result.batches()
    assert batches[0]["kinds"] == ["whole", "whole float32"]
    assert len({batch["frozen"] for batch in batches}) == 1
    if recipe == "dpo":
        assert result.losses[0] == pytest.approx(math.log(2), abs=1e-4)
    backbone = load_in_4bit(
        material.backbone,
        auto_class=AutoModelForSequenceClassification if recipe == "reward" else AutoModelForCausalLM,
        **({"num_labels": 1} if recipe == "reward" else {}),
    )
    model = PeftModel.from_pretrained(backbone, result.output_dir)
    torch.testing.assert_close(probe_logits(model), result.logits(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_part_keeps_its_rate_and_the_log_tells_it(recipes, material, recipe):
    rates = {"prefix_learning_rate": 1e-2, "aggregator_learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    result = recipes.run(recipe, **material.pair_options(max_steps=1, **rates)).check()
    (entry,) = (entry for entry in result.metrics["log_history"] if "loss" in entry)
    expected = {"prefix": 1e-2, "aggregator": 1e-3} | ({"backbone": 1e-3} if recipe == "reward" else {})
    assert {key: entry[f"learning_rate/{key}"] for key in expected} == expected
    assert sum(entry[f"stream_weight/{stream}"] for stream in range(2)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
def test_shipped_configurations_are_read_and_run(recipes, material, recipe):
    for config in sorted((REPOSITORY / "recipes" / "configs" / recipe).glob("*.yaml")):
        assert config.read_text().startswith("# accelerate launch")
        keys = yaml.safe_load(config.read_text())
        assert keys["output_dir"].startswith("runs/")
        options = material.pair_options(config=config, max_steps=1, dtype="float32")
        recipes.run(recipe, **options, num_train_epochs=None).check()
