"""Options of TRL that could do nothing in a recipe: none is taken in silence."""

import dataclasses
import pathlib

import pytest
from trl import SFTConfig

from parscale_adapt.training.unused_options import CPT, SFT, UNUSED_OPTIONS, refuse_unused_options


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
}


def arguments(folder, **options):
    return SFTConfig(output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, **options)


@pytest.mark.parametrize("option", UNUSED_OPTIONS, ids=lambda option: f"{option.name}-{'-'.join(option.recipes)}")
def test_each_is_refused_with_what_to_do_instead(tmp_path, option):
    value = VALUES.get(option.name, True)
    for recipe in option.recipes:
        with pytest.raises(ValueError, match=f"`{option.name}` has no effect in {recipe}, got ") as raised:
            refuse_unused_options(arguments(tmp_path, **{option.name: value}), recipe)
        assert str(raised.value).endswith(f": {option.remedy}.")


def test_the_defaults_and_what_has_an_effect_are_taken(tmp_path):
    for recipe in (CPT, SFT):
        refuse_unused_options(arguments(tmp_path), recipe)
    packed = {"packing": True, "eval_packing": False, "dataset_num_proc": 2, "pad_to_multiple_of": 8}
    refuse_unused_options(arguments(tmp_path, **packed), SFT)
    refuse_unused_options(arguments(tmp_path, packing=True, padding_free=True, eval_packing=True), SFT)


def test_every_option_of_trl_about_data_was_decided():
    """A new one has to be put into the table, or among those that have an effect in both recipes."""
    effective = {
        "activation_offloading",
        "chat_template_path",
        "eos_token",
        "loss_type",
        "max_length",
        "pad_token",
        "router_aux_loss_coef",
        "trust_remote_code",
    }
    in_sft_alone = {option.name for option in UNUSED_OPTIONS}
    own = set(SFTConfig.__annotations__) - {"learning_rate", "_VALID_DICT_FIELDS"}
    assert own - effective <= in_sft_alone
    assert {field.name for field in dataclasses.fields(SFTConfig)} >= in_sft_alone


def test_the_document_names_them_all():
    text = DOCUMENT.read_text()
    for option in UNUSED_OPTIONS:
        for recipe in option.recipes:
            assert f"| `{option.name}` | {recipe} | {option.remedy} |" in text
