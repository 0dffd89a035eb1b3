"""Every YAML file in recipes/configs/ is read by its recipe's parser, and its first line is the command that runs it."""

import shlex

import pytest
import yaml
from support.recipe_runs import REPOSITORY

from parscale_adapt.training import (
    BackboneArguments,
    DataArguments,
    InstructionArguments,
    PreferenceArguments,
    PromptArguments,
    RecipeParser,
    StreamConfig,
    StreamDistillationConfig,
    StreamDPOConfig,
    StreamGRPOConfig,
    StreamRewardConfig,
)
from parscale_adapt.tuner.config import ParScaleArguments


CONFIGS = REPOSITORY / "recipes" / "configs"
ARGUMENTS = {
    "cpt": (DataArguments, StreamConfig),
    "sft": (InstructionArguments, StreamConfig),
    "dpo": (PreferenceArguments, StreamDPOConfig),
    "reward": (PreferenceArguments, StreamRewardConfig),
    "grpo": (PromptArguments, StreamGRPOConfig),
    "distill": (InstructionArguments, StreamDistillationConfig),
}


@pytest.mark.parametrize(
    "path",
    sorted(path for recipe in ARGUMENTS for path in (CONFIGS / recipe).glob("*.yaml")),
    ids=lambda path: path.stem,
)
def test_a_configuration_is_read_by_its_recipe(path):
    recipe = path.parent.name
    types = (ParScaleArguments, BackboneArguments, *ARGUMENTS[recipe])
    arguments = RecipeParser(types).parse_args_and_config(["--config", str(path), "--use_cpu", "true"])
    _, backbone, data, training = arguments
    assert training.output_dir.startswith("runs/")
    keys = yaml.safe_load(path.read_text())
    assert set(keys) == set(backbone.explicit_settings) - {"config", "use_cpu"}
    assert (backbone.model_name_or_path is None) == path.stem.startswith(("demo", "smollm2"))
    assert data.sources() or backbone.model_name_or_path is None
    words = shlex.split(path.read_text().splitlines()[0].removeprefix("# "))
    assert words[:2] == ["accelerate", "launch"]
    assert f"recipes/{recipe}.py" in words
    assert REPOSITORY / words[words.index("--config") + 1] == path
    if "--config_file" in words:
        assert (REPOSITORY / words[words.index("--config_file") + 1]).is_file()


def test_the_second_stage_mixes_its_three_kinds_of_text_alike():
    mixture = yaml.safe_load((CONFIGS / "cpt" / "qwen2.5-3b_stage2_full_p4.yaml").read_text())
    general, *others = (mixture["datasets"][:2], mixture["datasets"][2:3], mixture["datasets"][3:])
    assert {round(sum(source["weight"] for source in kind), 6) for kind in (general, *others)} == {7}
    tokens_per_step = 8 * mixture["per_device_train_batch_size"] * mixture["gradient_accumulation_steps"] * 2048
    assert mixture["max_steps"] * tokens_per_step == pytest.approx(21e9, rel=1e-3)
