"""Wrong input to a recipe: one sentence, exit code 1, nothing trained, and most of it before any weight loads."""

import json
import shutil

import pytest
from peft import LoraConfig, get_peft_model
from support.recipe_runs import REPOSITORY, refusal
from transformers import AutoModelForCausalLM


SFT_DEMO = REPOSITORY / "recipes" / "configs" / "sft" / "demo.yaml"


@pytest.fixture(scope="module")
def finished(recipes, material):
    """A finished full run with checkpoints."""
    options = material.cpt_options(train_backbone=True, save_strategy="steps", save_steps=2, max_steps=2)
    return options, recipes.run("cpt", **options).check()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_streams": 0}, "`num_streams` must be an integer of at least 1, got 0"),
        ({"num_streams": "two"}, "invalid int value: 'two'"),
        ({"num_prefix_tokens": 0}, "`num_prefix_tokens` must be an integer of at least 1, got 0"),
        ({"aggregator_smoothing": 1.0}, "`aggregator_smoothing` must lie in [0, 1), got 1.0"),
        (
            {"init_weights": "zeros"},
            "`init_weights` must be one of normal, reparameterized, tokens, near_identity, got 'zeros'",
        ),
        ({"num_stream": 2}, "--num_stream"),
        ({"num_streams": 1}, "one stream on a frozen backbone has nothing to learn"),
        ({"load_in_4bit": True, "train_backbone": True}, "4-bit weights can't be trained"),
        ({"max_length": 1}, "`max_length` must be at least 2"),
        ({"packing": True}, "rows are packed already"),
        ({"attn_implementation": "flash_attention_9"}, "`attn_implementation` must be one of eager, sdpa"),
        ({"attn_implementation": "flash_attention_3"}, "needs a package that isn't installed"),
        ({"model_name_or_path": "./nothing/here"}, "where no folder is"),
        ({"text_field": "code"}, "has no field 'code': its fields are text"),
        ({"dataset_name": "./missing.jsonl"}, "missing.jsonl"),
        ({"dataset_split": "validation"}, "'validation'"),
        ({"streaming": True, "max_steps": -1}, "give `--max_steps`"),
        ({"adapter_name_or_path": "./nothing/here"}, "There is no folder ./nothing/here"),
        ({"lora_learning_rate": 1e-3}, "there is no shared LoRA: leave --lora_learning_rate out"),
        ({"lora": "8"}, "`lora` must be a JSON object of LoraConfig's fields"),
        ({"lora": "r=8"}, "`lora` must be JSON such as"),
        ({"lora": '{"rank": 8}'}, "`lora` has unknown fields ['rank']"),
        ({"lora": '{"r": 8}', "train_backbone": True}, "`lora` adds low-rank weights to a backbone"),
        ({"aggregator_learning_rate": 1e-3, "aggregator": "mean"}, "a mean has nothing to learn"),
        ({"prefix_learning_rate": 1e-3, "num_streams": 1, "train_backbone": True}, "one stream has no prefix"),
        ({"prefix_learning_rate": 0.0}, "`prefix_learning_rate` must be a positive, finite number, got 0.0"),
        ({"diversity_weight": -0.1}, "`diversity_weight` must be a finite number of at least 0, got -0.1"),
        (
            {"diversity_weight": 0.1, "num_streams": 1, "train_backbone": True},
            "one stream has no other to differ from",
        ),
        ({"verify_backbone": False}, "`verify_backbone=False` lets an adapter run on another backbone"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_cpt_refuses(recipes, material, options, sentence):
    assert sentence in refusal(recipes.run("cpt", **material.cpt_options(**options)))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_stream": 2}, "num_stream"),
        ({"num_streams": 2.5}, "`num_streams` must be an integer of at least 1, got 2.5"),
        ({"max_length": None}, "`max_length` must be at least 2 tokens per row, got None"),
    ],
)
def test_a_wrong_yaml_key_or_value_is_refused(recipes, material, tmp_path, settings, sentence):
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(settings))
    options = material.cpt_options(config=config) | dict.fromkeys(settings)
    options.pop("num_stream", None)
    assert sentence in refusal(recipes.run("cpt", **options))


@pytest.mark.parametrize("recipe", ["cpt", "sft"])
@pytest.mark.parametrize("content", ["", "{}\n", '{"other": "text"}\n', '{"text": 1, "prompt": 2, "completion": 3}\n'])
def test_data_without_text_is_refused(recipes, material, tmp_path, recipe, content):
    data = tmp_path / "data.jsonl"
    data.write_text(content)
    options = material.cpt_options() if recipe == "cpt" else material.sft_options()
    refusal(recipes.run(recipe, **{**options, "dataset_name": data}))


def test_a_conversation_without_an_answer_is_refused(recipes, material, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"messages": [{"role": "user", "content": "Hello"}]}) + "\n")
    sentence = refusal(recipes.run("sft", **material.sft_options(dataset_name=data)))
    assert "must end with an answer of the assistant" in sentence


def test_a_folder_of_something_else_is_refused(recipes, material, tmp_path):
    (tmp_path / "thesis.txt").write_text("irreplaceable")
    sentence = refusal(recipes.run("cpt", tmp_path, **material.cpt_options()))
    assert "is not empty and holds no run of a recipe" in sentence
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_same_run_again_needs_resume(recipes, finished):
    options, result = finished
    assert "already holds this run (checkpoint-2)" in refusal(recipes.run("cpt", result.output_dir, **options))


def changed_at(folder):
    """When each file of a run was changed; the lock is taken by whoever looks at the folder."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_streams": 4}, "`streams.num_streams` is 2 there and 4 here"),
        ({"num_prefix_tokens": 5}, "`streams.num_prefix_tokens` is 4 there and 5 here"),
        ({"train_backbone": False}, "`streams.train_backbone` is True there and False here"),
        ({"model_name_or_path": "gpt2"}, "`backbone`"),
        ({"learning_rate": 1e-4}, "`learning_rate` is 0.001 there and 0.0001 here"),
        ({"prefix_learning_rate": 1e-2}, "`prefix_learning_rate` is None there and 0.01 here"),
        ({"warmup_steps": 1}, "`warmup_steps` is 0 there and 1"),
        ({"adam_beta2": 0.95}, "`adam_beta2` is 0.999 there and 0.95 here"),
        ({"max_grad_norm": 0.5}, "`max_grad_norm` is 1.0 there and 0.5 here"),
    ],
)
@pytest.mark.parametrize("resume", [True, None])
def test_another_run_in_the_folder_is_refused(recipes, finished, changes, sentence, resume):
    options, result = finished
    before = changed_at(result.output_dir)
    options = {**options, **changes, "resume_from_checkpoint": resume}
    assert sentence in refusal(recipes.run("cpt", result.output_dir, **options))
    assert changed_at(result.output_dir) == before


def test_resuming_on_other_weights_in_the_same_place_is_refused(recipes, material, tmp_path):
    backbone = tmp_path / "backbone"
    AutoModelForCausalLM.from_pretrained(material.backbone).save_pretrained(backbone)
    material.tokenizer().save_pretrained(backbone)
    options = material.cpt_options(model_name_or_path=backbone, save_strategy="steps", save_steps=2, max_steps=2)
    folder = tmp_path / "run"
    recipes.run("cpt", folder, **options).check()
    model = AutoModelForCausalLM.from_pretrained(backbone)
    model.model.norm.weight.data += 0.5
    model.save_pretrained(backbone)
    result = recipes.run("cpt", folder, resume_from_checkpoint=True, **options)
    assert "was trained on another backbone" in refusal(result, loads_weights=True)


@pytest.mark.parametrize("recipe", ["cpt", "sft"])
def test_held_out_rows_without_a_target_are_refused(recipes, material, tmp_path, recipe):
    data = tmp_path / "heldout.jsonl"
    rows = {"cpt": {"text": ""}, "sft": {"prompt": "word " * 400, "completion": "yes"}}
    data.write_text(f"{json.dumps(rows[recipe])}\n" * 4)
    options = material.cpt_options() if recipe == "cpt" else material.sft_options(max_length=64)
    sentence = refusal(recipes.run(recipe, **{**options, "heldout_dataset": data}))
    assert f"held out: {data}" in sentence


def test_data_that_changed_is_refused_when_a_run_goes_on(recipes, material, tmp_path):
    data, folder = tmp_path / "data.jsonl", tmp_path / "run"
    shutil.copy(material.text, data)
    options = material.cpt_options(dataset_name=data, save_strategy="steps", save_steps=2, max_steps=2)
    recipes.run("cpt", folder, **options).check()
    shutil.copy(material.other_text, data)
    sentence = refusal(recipes.run("cpt", folder, resume_from_checkpoint=True, **options))
    assert f"the content of {data} is another now" in sentence


def test_a_new_optimizer_without_a_checkpoint_is_refused(recipes, material):
    result = recipes.run("cpt", **material.cpt_options(restart_optimizer=True))
    assert "`restart_optimizer` has no effect without" in refusal(result, loads_weights=True)


def test_a_start_that_trained_nothing_does_not_hold_the_folder(recipes, material, tmp_path):
    folder = tmp_path / "run"
    refusal(recipes.run("cpt", folder, **material.cpt_options(text_field="code")))
    recipes.run("cpt", folder, **material.cpt_options(max_steps=1)).check()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_streams": 8}, "`num_streams` is 8, but the adapter"),
        ({"num_streams": 4}, "`num_streams` is 4, but the adapter"),  # the default, but given
        ({"num_streams": None, "num-streams": 4}, "`num_streams` is 4, but the adapter"),
        ({"num_streams": None, "config": SFT_DEMO}, "`num_streams` is 4, but the adapter"),
        ({"init_weights": "tokens"}, "`init_weights` is 'tokens', but the adapter"),
        ({"load_in_4bit": True}, "carries a trained backbone, which 4-bit weights can't hold"),
    ],
)
def test_settings_that_an_adapter_does_not_have_are_refused(recipes, material, finished, changes, sentence):
    options = material.sft_options(adapter_name_or_path=finished[1].output_dir, **changes)
    assert sentence in refusal(recipes.run("sft", **options))


def test_an_adapter_of_another_method_is_refused(recipes, material, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(material.backbone)
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(tmp_path)
    result = recipes.run("sft", **material.sft_options(adapter_name_or_path=tmp_path))
    assert "must hold a ParScale adapter, got one of the method LORA" in refusal(result)


@pytest.mark.parametrize(
    ("environment", "options", "sentence"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, {}, "only FSDP2 is supported"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
            {},
            "on every rank",
        ),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            {},
            "use --gradient_checkpointing true",
        ),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"},
            {"load_in_4bit": True},
            "4-bit weights under FSDP2",
        ),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            {"load_in_4bit": True},
            "ZeRO-3 doesn't shard 4-bit weights",
        ),
        ({"WORLD_SIZE": "2", "RANK": "0"}, {"use_cpu": None}, "2 processes were launched"),
    ],
    ids=["fsdp1", "fsdp_lazy_loading", "fsdp_checkpointing", "fsdp_4bit", "zero3_4bit", "lone_processes"],
)
def test_engines_that_can_not_work_are_refused(recipes, material, environment, options, sentence):
    assert sentence in refusal(recipes.run("cpt", environment=environment, **material.cpt_options(**options)))


def test_fsdp_on_cpus_is_refused_where_it_has_no_effect(recipes, material):
    environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
    result = recipes.run("cpt", environment=environment, **material.cpt_options())
    assert "FSDP has no effect on CPUs" in refusal(result, loads_weights=True)
