"""GRPO: rewards rise, the reference is the model as it was, both ways of sampling, kills, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from support.recipe_runs import REPOSITORY, REWARDS, check_saved, refusal


SAVES = {"save_strategy": "steps", "save_steps": 1}
FROM_ADAPTER = {"num_streams": None, "num_prefix_tokens": None}


def log_of(result, key):
    return [entry[key] for entry in result.metrics["log_history"] if "loss" in entry and key in entry]


def test_rewards_rise_and_are_told(recipes, material):
    options = material.prompt_options(
        max_steps=20, learning_rate=1e-2, train_backbone=True, per_device_train_batch_size=16
    )
    result = recipes.run("grpo", **options).check()
    rewards = log_of(result, "reward")
    assert sum(rewards[-5:]) > 1.5 * sum(rewards[:5])
    assert result.metrics["heldout_loss"] is None
    assert 0 < result.metrics["heldout"]["reward"] <= 1
    assert result.metrics["heldout"]["num_questions"] == 8
    card = (result.output_dir / "README.md").read_text()
    assert "![reward curve](reward_curve.png)" in card
    assert "held-out reward" in card
    assert "held-out loss" not in card
    assert (result.output_dir / "reward_curve.png").stat().st_size > 1000
    assert not any(".ref." in name for name in result.tensors)
    check_saved(result)


@pytest.mark.parametrize(
    ("start", "full"),
    [("new", False), ("new", True), (False, False), (True, False), (False, True)],
    ids=["new", "new_then_full", "of_sft", "of_full_sft", "of_sft_then_full"],
)
def test_the_reference_is_the_model_as_it_was(recipes, material, tuned, start, full):
    from_adapter = {} if start == "new" else {"adapter_name_or_path": tuned[start].output_dir, **FROM_ADAPTER}
    options = material.prompt_options(train_backbone=full, beta=0.1, max_steps=3, **from_adapter)
    result = recipes.run("grpo", **options).check()
    divergences = log_of(result, "kl")
    assert divergences[0] == pytest.approx(0, abs=1e-6)
    assert divergences[-1] > 1e-6
    check_saved(result)


@pytest.mark.parametrize("bf16", [False, True])
def test_continuous_batching_answers_as_generate_does(recipes, material, tuned, bf16):
    """Greedy answers to held-out questions earn the same, and training keeps its types."""
    start = {"adapter_name_or_path": tuned[False].output_dir, **FROM_ADAPTER, "learning_rate": 1e-9}
    options = material.prompt_options(max_steps=2, bf16=bf16, max_prompt_length=64, **start)
    by_generate = recipes.run("grpo", **options).check()
    batched = recipes.run("grpo", use_transformers_continuous_batching=True, **options).check()
    assert batched.metrics["heldout"] == by_generate.metrics["heldout"]
    assert {tuple(batch["kinds"]) for batch in batched.batches()} == {("whole", "whole float32")}
    assert min(log_of(batched, "reward")) > 0
    if not bf16:
        check_saved(batched)


# Without the second part, all answers to a question are trained on at once, and checkpoints fall between two of them.
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_transformers_continuous_batching": True, "max_prompt_length": 64},
        {"num_iterations": 2, "steps_per_generation": 2, "per_device_train_batch_size": 4, "beta": 0.1},
    ],
    ids=["between_answers", "batched", "amid_answers"],
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(recipes, material, tmp_path, changes):
    lines = (
        Path(material.prompts).read_text().splitlines(keepends=True)[:6]
    )  # three times two questions: each epoch ends within the run
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(lines))
    num_steps = 14 if "num_iterations" in changes else 8
    options = material.prompt_options(dataset_name=data, max_steps=num_steps, **SAVES, **changes)
    whole = recipes.run("grpo", tmp_path / "whole", **options).check()
    killed = recipes.run("grpo", tmp_path / "killed", kill_at_batch=5, **options)
    resumed = recipes.run("grpo", tmp_path / "killed", resume_from_checkpoint=True, **options).check()
    assert killed.exit_code == -9
    batches = [[(one["step"], one["ids"], one["loss"]) for one in run.batches()] for run in (whole, killed, resumed)]
    assert batches[1] == batches[0][:5]
    assert batches[2] == batches[0][5:]
    assert log_of(resumed, "reward") == log_of(whole, "reward")
    assert resumed.metrics["heldout"] == whole.metrics["heldout"]
    assert all(torch.equal(resumed.tensors[name], tensor) for name, tensor in whole.tensors.items())


def test_answers_in_use_that_are_lost_are_named(recipes, material, tmp_path):
    options = material.prompt_options(max_steps=2, **SAVES)
    recipes.run("grpo", tmp_path, kill_at_batch=1, **options)
    (tmp_path / "checkpoint-1" / "answers_0.safetensors").unlink()
    sentence = refusal(recipes.run("grpo", tmp_path, resume_from_checkpoint=True, **options), loads_weights=True)
    assert "no answers_0.safetensors, the answers in use" in sentence


def test_a_reward_function_that_changed_is_refused_when_a_run_goes_on(recipes, material, tmp_path):
    rewards = tmp_path / "rewards.py"
    rewards.write_text(REWARDS.read_text())
    options = material.prompt_options(reward_functions=f"{rewards}:share_of_lower_case", max_steps=2, **SAVES)
    recipes.run("grpo", tmp_path / "run", kill_at_batch=1, **options)
    rewards.write_text(REWARDS.read_text().replace("/ 16", "/ 8"))
    sentence = refusal(recipes.run("grpo", tmp_path / "run", resume_from_checkpoint=True, **options))
    assert f"the content of reward function: {rewards}:share_of_lower_case is another now" in sentence


def test_conversations_are_answered_and_rewarded_by_several_functions(recipes, material, tuned, tmp_path):
    rows = [json.loads(line) for line in Path(material.prompts).read_text().splitlines()]
    data = tmp_path / "prompts.jsonl"
    messages = [{"role": "system", "content": "Be brief."}]
    lines = [{**row, "prompt": [*messages, {"role": "user", "content": row["prompt"]}]} for row in rows]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    functions = [f"{REWARDS}:{name}" for name in ("share_of_lower_case", "mentions_answer")]
    options = material.prompt_options(
        dataset_name=data,
        adapter_name_or_path=tuned[False].output_dir,
        prompt_format="chat",
        reward_functions=functions,
        max_steps=2,
        **FROM_ADAPTER,
    )
    result = recipes.run("grpo", **options).check()
    assert len(log_of(result, "rewards/mentions_answer/mean")) == 2
    assert {"reward", "reward of share_of_lower_case", "reward of mentions_answer"} < result.metrics["heldout"].keys()


BAD_REWARDS = {
    "one_too_few": "returned 1 rewards for 2 completions: it must return one for each",
    "not_a_number": "returned nan: rewards must be finite numbers",
    "words": "returned 'good': rewards must be finite numbers",
    "no_list": "must return a list of numbers, got float",
    "needs_column": "is called with `prompts`, `completions`, `completion_ids` and the columns answer",
    "no_keywords": "must take further keywords (`**kwargs`)",
    "fails": "fails on the first questions and empty answers (KeyError: 'gold')",
    "later": "must be a plain function",
    "NOT_A_FUNCTION": "must be a plain function, got 3",
    "missing": "which can't be imported (AttributeError",
}


@pytest.mark.parametrize("name", BAD_REWARDS)
def test_reward_functions_that_can_not_be_used_are_refused(recipes, material, name):
    result = recipes.run("grpo", **material.prompt_options(reward_functions=f"{REWARDS}:{name}"))
    assert BAD_REWARDS[name] in refusal(result)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"use_vllm": True}, "`use_vllm` can't sample answers in streams"),
        ({"reward_functions": "nothing.here"}, "names nothing.here, which can't be imported (ModuleNotFoundError"),
        ({"reward_functions": "./nothing.py:here"}, "there is no file nothing.py"),
        ({"reward_functions": None}, "`reward_functions` is empty: name what rewards answers"),
        ({"reward_functions": [f"{REWARDS}:words"] * 2}, "names two functions 'words'"),
        ({"prompt_field": "question"}, "needs a question in `question`; it has prompt, answer (name its column with"),
        ({"prompt_format": "chat"}, "has no chat template, so that its model knows no chat to answer in"),
        ({"prompt_format": "raw"}, "invalid choice: 'raw'"),
        ({"max_prompt_length": 2}, "none of 16 questions has at most `max_prompt_length` 2 tokens"),
        ({"num_generations": 3}, "generation_batch_size (8) must be divisible by num_generations (3)"),
        ({"num_generations": 1}, "`num_generations` must be at least 2 answers to each question"),
        ({"num_generations": 0}, "`num_generations` must be at least 2 answers to each question"),
        ({"max_completion_length": 0}, "`max_completion_length` must be at least 1 token, got 0"),
        (
            {"dataset_name": None, "heldout_dataset": None, "prompt_format": "chat"},
            "must be 'text' for the embedded sums",
        ),
        ({"sync_ref_model": True}, "`sync_ref_model` has no effect in grpo.py, got True: the reference stays"),
        ({"vllm_mode": "server"}, "`vllm_mode` has no effect, since vLLM samples no answers in streams"),
        ({"reward_weights": ["1", "2"]}, "`reward_weights` has 2 weights for 1 reward functions"),
        ({"num_streams": 1}, "one stream on a frozen backbone has nothing to learn"),
        ({"chat_template": "./template.jinja"}, "`chat_template` has no effect with `prompt_format='text'`"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_that_can_not_work_are_refused(recipes, material, options, sentence):
    assert sentence in refusal(recipes.run("grpo", **material.prompt_options(**options)))


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"text": "This."}, "the row needs a question in `prompt`; it has text"),
        ({"prompt": ""}, "`prompt` is empty"),
        ({"prompt": [{"role": "user", "content": "A?"}]}, "`prompt` must hold text with `prompt_format='text'`"),
    ],
    ids=["no_column", "empty", "messages"],
)
def test_questions_that_can_not_be_answered_are_refused(recipes, material, tmp_path, row, sentence):
    data = tmp_path / "prompts.jsonl"
    data.write_text((json.dumps(row) + "\n") * 4)
    message = refusal(recipes.run("grpo", **material.prompt_options(dataset_name=data)))
    assert sentence in message
    assert str(data) in message


def test_fewer_questions_than_are_answered_at_a_time_are_refused(recipes, material):
    result = recipes.run("grpo", **material.prompt_options(per_device_train_batch_size=128))
    assert "has 16 questions, and 32 are answered at a time" in refusal(result, loads_weights=True)


def test_shipped_configurations_are_read_and_run(recipes, material, tuned):
    for config in sorted((REPOSITORY / "recipes" / "configs" / "grpo").glob("*.yaml")):
        assert config.read_text().startswith("# accelerate launch")
        keys = yaml.safe_load(config.read_text())
        assert keys["output_dir"].startswith("runs/")
        sizes = {"num_streams": None, "num_prefix_tokens": None, "gradient_accumulation_steps": 1, "dtype": "float32"}
        options = material.prompt_options(config=config, max_steps=1, prompt_field="prompt", **sizes)
        recipes.run("grpo", **options).check()
