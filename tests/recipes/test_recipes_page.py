"""docs/recipes.md: its commands run one after the other, each on what the one before left, with tiny settings."""

import re
import shlex
from functools import partial

import pytest
import yaml
from peft import AutoPeftModelForSequenceClassification
from support.recipe_runs import REPOSITORY


PAGE = (REPOSITORY / "docs" / "recipes.md").read_text()


def commands():
    (block,) = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    return [shlex.split(line) for line in block.splitlines()]


@pytest.fixture
def teacher(recipes, material):
    return recipes.run("sft", **material.sft_options(num_streams=4, max_steps=1)).check().output_dir


def test_the_commands_of_the_page_run_in_their_order(recipes, material, teacher, tmp_path, monkeypatch):
    data = {
        "cpt": material.cpt_options,
        "sft": material.sft_options,
        "dpo": material.pair_options,
        "reward": material.pair_options,
        "grpo": material.prompt_options,
        "distill": partial(material.distillation_options, teacher),
    }
    for words in commands():
        assert words[:2] == ["accelerate", "launch"]
        recipe = words[2].removeprefix("recipes/").removesuffix(".py")
        demo = REPOSITORY / "recipes" / "configs" / recipe / "demo.yaml"  # what runs without arguments, too
        given = {name.removeprefix("--"): value for name, value in zip(words[3::2], words[4::2], strict=True)}
        given = {name: tmp_path / value if value.startswith("runs/") else value for name, value in given.items()}
        assert REPOSITORY / given.pop("config", f"recipes/configs/{recipe}/demo.yaml") == demo
        sizes = {"num_streams": None, "num_prefix_tokens": None, "max_steps": 1}
        sizes |= {"train_backbone": None} if recipe == "grpo" else {"max_length": 128}
        folder = given.pop("output_dir", tmp_path / yaml.safe_load(demo.read_text())["output_dir"])
        recipes.run(recipe, folder, config=demo, **{**data[recipe](**sizes), **given}).check()
    judging, rewarding = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in (judging, rewarding):
        exec(compile(block, "docs/recipes.md", "exec"), names)
    assert names["judge"].peft_config["default"].num_streams == 4
    assert AutoPeftModelForSequenceClassification.__name__ in judging
    assert names["short"](completions=["a" * 50]) == [-0.5]
