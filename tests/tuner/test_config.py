import dataclasses
import json
import math

import pytest
from peft import LoraConfig, PeftConfig, PeftModel, PeftModelForCausalLM, TaskType, get_peft_model
from support.tiny_models import random_tokens, tiny_model

from parscale_adapt import ParScaleConfig
from parscale_adapt.tuner.config import ParScaleArguments


@pytest.mark.parametrize("config_class", [ParScaleArguments, ParScaleConfig])
@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("num_streams", 0, "must be an integer of at least 1, got 0"),
        ("num_streams", -4, "must be an integer of at least 1, got -4"),
        ("num_streams", 2.0, r"must be an integer of at least 1, got 2\.0"),
        ("num_streams", True, "must be an integer of at least 1, got True"),
        ("num_streams", "4", "must be an integer of at least 1, got '4'"),
        ("num_prefix_tokens", 0, "must be an integer of at least 1, got 0"),
        ("num_prefix_tokens", 48.5, r"must be an integer of at least 1, got 48\.5"),
        ("num_prefix_tokens", None, "must be an integer of at least 1, got None"),
        ("aggregator_smoothing", 1, r"must lie in \[0, 1\), got 1"),
        ("aggregator_smoothing", -0.1, r"must lie in \[0, 1\), got -0\.1"),
        ("aggregator_smoothing", math.nan, r"must lie in \[0, 1\), got nan"),
        ("init_std", 0, "must be positive, got 0"),
        ("init_std", -0.02, r"must be positive, got -0\.02"),
        ("init_std", math.nan, "must be positive, got nan"),
        ("init_weights", "gaussian", "must be one of normal, reparameterized, tokens, near_identity, got 'gaussian'"),
        ("stream_chunk_size", 0, "must be None or an integer of at least 1, got 0"),
        ("stream_chunk_size", True, "must be None or an integer of at least 1, got True"),
        ("stream_chunk_size", 1.5, r"must be None or an integer of at least 1, got 1\.5"),
        ("init_weights", None, "must be one of normal, reparameterized, tokens, near_identity, got None"),
    ],
)
def test_a_bad_value_is_refused_with_its_field_rule_and_value(config_class, field, value, rule):
    with pytest.raises(ValueError, match=f"^`{field}` {rule}"):
        config_class(**{field: value})


@pytest.mark.parametrize("config_class", [ParScaleArguments, ParScaleConfig])
def test_a_shared_lora_is_given_as_peft_has_it_as_a_dictionary_or_as_json(config_class):
    fields = {"r": 4, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"]}
    given = [config_class(lora=lora) for lora in (LoraConfig(**fields), fields, json.dumps(fields))]
    found = [
        ParScaleConfig(**dataclasses.asdict(config)) if config_class is ParScaleArguments else config
        for config in given
    ]
    assert all(isinstance(config.lora, LoraConfig) for config in found)
    assert found[0].to_dict() == found[1].to_dict() == found[2].to_dict()
    assert found[0].to_dict()["lora"].items() >= fields.items()
    json.dumps(dataclasses.asdict(given[0])["lora"] if config_class is ParScaleArguments else found[0].to_dict())
    with pytest.raises(TypeError, match="must be a JSON object of LoraConfig's fields"):
        config_class(lora="[8]")
    with pytest.raises(ValueError, match="`lora` must be JSON such as"):
        config_class(lora="eight")


def chunk_sizes(model):
    return model.get_base_model().model.parscale.chunk_size, model.peft_config[model.active_adapter].stream_chunk_size


def test_how_many_streams_run_at_a_time_is_chosen_on_loading_and_changed_later_and_never_saved(tmp_path):
    config = ParScaleConfig(num_streams=3, num_prefix_tokens=3, stream_chunk_size=2)
    model = get_peft_model(tiny_model(), config)
    assert chunk_sizes(model) == (2, 2)
    model.set_stream_chunk_size(1)
    assert chunk_sizes(model) == (1, 1)
    assert config.stream_chunk_size == 2
    model.add_adapter("other", ParScaleConfig(num_streams=2, num_prefix_tokens=3))
    model.set_adapter("other")
    assert chunk_sizes(model) == (None, None)
    model.set_adapter("default")
    for wrong in (0, "1"):
        with pytest.raises(ValueError, match="`stream_chunk_size` must be None or an integer of at least 1, got"):
            model.set_stream_chunk_size(wrong)
    assert chunk_sizes(model) == (1, 1)
    model.save_pretrained(tmp_path)
    assert "stream_chunk_size" not in json.loads((tmp_path / "adapter_config.json").read_text())
    assert chunk_sizes(PeftModel.from_pretrained(tiny_model(), tmp_path)) == (None, None)
    assert chunk_sizes(PeftModel.from_pretrained(tiny_model(), tmp_path, stream_chunk_size=1)) == (1, 1)


@pytest.mark.parametrize("value", [True, False])
def test_the_booleans_of_peft_mean_the_start_of_the_paper(value):
    assert ParScaleConfig(init_weights=value).init_weights == "normal"


def test_the_defaults_are_those_of_the_paper():
    config = ParScaleConfig()
    assert (config.num_prefix_tokens, config.aggregator_smoothing, config.init_std) == (48, 0.1, 0.02)
    assert config.init_weights == "normal"
    assert not config.train_backbone


def test_modules_to_save_beside_a_trained_backbone_are_refused():
    with pytest.raises(ValueError, match=r"`modules_to_save` names parts of the backbone, got \['lm_head'\]"):
        ParScaleConfig(train_backbone=True, modules_to_save=["lm_head"])


def test_streams_are_for_causal_language_models_unless_said_otherwise():
    assert ParScaleConfig().task_type == "CAUSAL_LM"
    model = get_peft_model(tiny_model(), ParScaleConfig(num_streams=2, num_prefix_tokens=3)).eval()
    assert isinstance(model, PeftModelForCausalLM)
    options = {"max_new_tokens": 3, "do_sample": False, "adapter_names": ["default", "__base__"]}
    assert model.generate(input_ids=random_tokens(), **options).shape == (2, 12)
    assert type(get_peft_model(tiny_model(), ParScaleConfig(task_type=None))) is PeftModel


def test_tasks_with_an_encoder_are_refused_and_unknown_ones():
    with pytest.raises(ValueError, match=r"must be one of SEQ_CLS, CAUSAL_LM, .*, got 'SEQ_2_SEQ_LM': streams run"):
        ParScaleConfig(task_type=TaskType.SEQ_2_SEQ_LM)
    with pytest.raises(ValueError, match="Invalid task type: 'CHESS'"):
        ParScaleConfig(task_type="CHESS")


def test_target_modules_are_refused_from_users_and_read_from_files():
    with pytest.raises(ValueError, match=r"`target_modules` can't be chosen, got \['q_proj'\]"):
        ParScaleConfig(target_modules=["q_proj"])
    config = ParScaleConfig(target_modules=["model"], backbone_fingerprint={"shape": "{}"})
    assert config.target_modules == ["model"]


def test_every_own_field_has_help():
    assert all(field.metadata["help"] for field in dataclasses.fields(ParScaleArguments))


def test_no_field_makes_trl_slice_the_logits():
    assert "num_virtual_tokens" not in {field.name for field in dataclasses.fields(ParScaleConfig)}
    assert not hasattr(ParScaleConfig(), "num_virtual_tokens")
    assert not ParScaleConfig().is_prompt_learning


def test_the_type_is_a_plain_string_with_the_attributes_that_peft_reads():
    peft_type = ParScaleConfig().peft_type
    assert peft_type == "PARSCALE"
    assert (peft_type.value, peft_type.name) == ("PARSCALE", "PARSCALE")
    assert str(peft_type) == "PeftType.PARSCALE"
    assert json.dumps(peft_type) == '"PARSCALE"'


def test_a_config_survives_its_file(tmp_path):
    config = ParScaleConfig(
        task_type="CAUSAL_LM",
        num_streams=8,
        num_prefix_tokens=5,
        aggregator_smoothing=0.25,
        init_std=0.5,
        init_weights="tokens",
        modules_to_save=["lm_head"],
        backbone_fingerprint={"shape": "{}"},
    )
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, ParScaleConfig)
    assert loaded.to_dict() == config.to_dict()


def test_skipping_the_check_of_the_backbone_is_never_saved(tmp_path):
    ParScaleConfig(verify_backbone=False).save_pretrained(tmp_path)
    assert "verify_backbone" not in json.loads((tmp_path / "adapter_config.json").read_text())
    assert PeftConfig.from_pretrained(tmp_path).verify_backbone
    assert not ParScaleConfig.from_pretrained(tmp_path, verify_backbone=False).verify_backbone
