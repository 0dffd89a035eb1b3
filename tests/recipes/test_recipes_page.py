"""docs/recipes.md: its commands run one after the other, each on what the one before left, with tiny settings."""

import re
import shlex

import yaml
from peft import AutoPeftModelForSequenceClassification
from support.recipe_runs import REPOSITORY


PAGE = (REPOSITORY / "docs" / "recipes.md").read_text()


def commands():
    (block,) = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    return [shlex.split(line) for line in block.splitlines()]


def test_the_commands_of_the_page_run_in_their_order(recipes, material, tmp_path, monkeypatch):
    data = {
        "cpt": material.cpt_options,
        "sft": material.sft_options,
        "dpo": material.pair_options,
        "reward": material.pair_options,
    }
    for words in commands():
        assert words[:2] == ["accelerate", "launch"]
        recipe = words[2].removeprefix("recipes/").removesuffix(".py")
        demo = REPOSITORY / "recipes" / "configs" / recipe / "demo.yaml"  # what runs without arguments, too
        given = {name.removeprefix("--"): value for name, value in zip(words[3::2], words[4::2], strict=True)}
        given = {name: tmp_path / value if value.startswith("runs/") else value for name, value in given.items()}
        assert REPOSITORY / given.pop("config", f"recipes/configs/{recipe}/demo.yaml") == demo
        sizes = {"num_streams": None, "num_prefix_tokens": None, "max_steps": 1, "max_length": 128}
        folder = given.pop("output_dir", tmp_path / yaml.safe_load(demo.read_text())["output_dir"])
        recipes.run(recipe, folder, config=demo, **{**data[recipe](**sizes), **given}).check()
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(block, "docs/recipes.md", "exec"), names)
    assert names["judge"].peft_config["default"].num_streams == 4
    assert AutoPeftModelForSequenceClassification.__name__ in block
