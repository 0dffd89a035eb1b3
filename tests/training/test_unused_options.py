"""Options of TRL that could do nothing in a recipe: none is taken in silence."""

import dataclasses
import pathlib

import pytest
from trl import DistillationConfig, DPOConfig, GRPOConfig, RewardConfig, SFTConfig

from parscale_adapt.training.stream_config import StreamDistillationConfig
from parscale_adapt.training.unused_options import (
    CPT,
    DISTILL,
    DPO,
    GRPO,
    REWARD,
    SFT,
    UNUSED_OPTIONS,
    refuse_unused_options,
)


DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "data.md"
# A value of each that is not the default.
VALUES = {
    "model_init_kwargs": {"dtype": "float32"},
    "dataset_kwargs": {"skip_prepare_dataset": True},
    "dataset_text_field": "body",
    "packing_strategy": "wrapped",
    "pad_to_multiple_of": 8,
    "train_sampling_strategy": "group_by_length",
    "truncation_mode": "keep_end",
    "dataset_num_proc": 2,
    "hub_strategy": "checkpoint",
    "ref_model_mixup_alpha": 0.1,
    "ref_model_sync_steps": 3,
    "log_multimodal": False,
    "transformers_continuous_batching_config": {"page_size": 32},
    "chat_template_kwargs": {"enable_thinking": False},
    "teacher_model_init_kwargs": {"dtype": "float32"},
    "max_completion_length": 16,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.5,
    "generation_kwargs": {"num_beams": 2},
    "cache_implementation": "static",
    "ds3_gather_for_generation": False,
}
CONFIGS = {
    CPT: SFTConfig,
    SFT: SFTConfig,
    DPO: DPOConfig,
    REWARD: RewardConfig,
    GRPO: GRPOConfig,
    DISTILL: DistillationConfig,
}


def arguments(folder, recipe=SFT, **options):
    config = StreamDistillationConfig if recipe == DISTILL else CONFIGS[recipe]
    if recipe == DISTILL:
        options = {"train_on_data": True, **options}
    return config(output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, **options)


@pytest.mark.parametrize("option", UNUSED_OPTIONS, ids=lambda option: f"{option.name}-{'-'.join(option.recipes)}")
def test_each_is_refused_with_what_to_do_instead(tmp_path, option):
    value = VALUES.get(option.name, True)
    for recipe in option.recipes:
        with pytest.raises(ValueError, match=f"`{option.name}` has no effect in {recipe}, got ") as raised:
            refuse_unused_options(arguments(tmp_path, recipe, **{option.name: value}), recipe)
        assert str(raised.value).endswith(f": {option.remedy}.")


def test_the_defaults_and_what_has_an_effect_are_taken(tmp_path):
    for recipe in CONFIGS:
        refuse_unused_options(arguments(tmp_path, recipe), recipe)
    packed = {"packing": True, "eval_packing": False, "dataset_num_proc": 2, "pad_to_multiple_of": 8}
    refuse_unused_options(arguments(tmp_path, **packed), SFT)
    refuse_unused_options(arguments(tmp_path, packing=True, padding_free=True, eval_packing=True), SFT)
    batched = {
        "transformers_continuous_batching_config": {"page_size": 32},
        "use_transformers_continuous_batching": True,
    }
    refuse_unused_options(arguments(tmp_path, GRPO, **batched), GRPO)
    refuse_unused_options(
        arguments(tmp_path, DISTILL, train_on_data=False, top_p=0.9, max_completion_length=8), DISTILL
    )


EFFECTIVE = {
    "activation_offloading",
    "chat_template_path",
    "dataset_num_proc",
    "eos_token",
    "loss_type",
    "max_length",
    "pad_to_multiple_of",
    "pad_token",
    "router_aux_loss_coef",
    "trust_remote_code",
}
_SAMPLING = {
    "beta",
    "cache_implementation",
    "disable_dropout",
    "ds3_gather_for_generation",
    "generation_kwargs",
    "log_completions",
    "log_unique_prompts",
    "max_completion_length",
    "min_p",
    "num_completions_to_print",
    "repetition_penalty",
    "shuffle_dataset",
    "temperature",
    "top_k",
    "top_p",
    "use_vllm",  # refused, with its own options, by the configuration
}
IN_ONE = {
    SFT: set(),
    DPO: {
        "beta",
        "disable_dropout",
        "discopop_tau",
        "f_alpha_divergence_coef",
        "f_divergence_type",
        "label_smoothing",
        "ld_alpha",
        "loss_weights",
        "precompute_ref_batch_size",
        "precompute_ref_log_probs",
        "use_weighting",
    },
    REWARD: {"center_rewards_coefficient", "disable_dropout"},
    GRPO: _SAMPLING
    | {
        "cast_lm_head_to_fp32",
        "chat_template_kwargs",
        "delta",
        "entropy_coef",
        "entropy_coef_delta",
        "entropy_coef_max",
        "entropy_coef_min",
        "entropy_target",
        "epsilon",
        "epsilon_high",
        "generation_batch_size",
        "importance_sampling_level",
        "log_completions_hub_repo",
        "mask_truncated_completions",
        "multi_objective_aggregation",
        "num_generations",
        "num_generations_eval",
        "num_iterations",
        "off_policy_mask_threshold",
        "reward_weights",
        "sapo_temperature_neg",
        "sapo_temperature_pos",
        "scale_rewards",
        "steps_per_generation",
        "top_entropy_quantile",
        "use_adaptive_entropy",
        "use_bias_correction_kl",
        "use_transformers_continuous_batching",
        "use_transformers_paged",
        "vespo_k_neg",
        "vespo_k_pos",
        "vespo_lambda_neg",
        "vespo_lambda_pos",
    },
    DISTILL: _SAMPLING | {"teacher_model_name_or_path"},
}


@pytest.mark.parametrize("recipe", IN_ONE)
def test_every_option_of_trl_about_data_was_decided(recipe):
    """A new one has to be put into the table, or among those that have an effect."""
    refused = {option.name for option in UNUSED_OPTIONS if recipe == SFT or recipe in option.recipes}
    own = set(CONFIGS[recipe].__annotations__) - {"learning_rate", "_VALID_DICT_FIELDS"}
    own = {name for name in own if not name.startswith("vllm_")}
    assert own - EFFECTIVE - IN_ONE[recipe] <= refused
    refused_here = {option.name for option in UNUSED_OPTIONS if recipe in option.recipes}
    assert {field.name for field in dataclasses.fields(CONFIGS[recipe])} >= refused_here


def test_the_document_names_them_all():
    text = DOCUMENT.read_text()
    for option in UNUSED_OPTIONS:
        for recipe in option.recipes:
            assert f"| `{option.name}` | {recipe} | {option.remedy} |" in text
