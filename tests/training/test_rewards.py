"""Reward functions: what those that ship find, what their answers must be, and by which names they are found."""

import json
import math
import pickle
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from support.recipe_runs import REWARDS

from parscale_adapt.training.grpo_trainer import mean_rewards
from parscale_adapt.training.rewards import (
    RewardError,
    checked,
    exact_number,
    final_number,
    gsm8k_answer,
    load_reward_functions,
    try_reward_functions,
)


GSM8K = [
    json.loads(line) for line in (Path(__file__).parents[1] / "material" / "gsm8k.jsonl").read_text().splitlines()
]


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("7", "7", 1.0),
        (" 7\n", "7", 1.0),
        ("7 apples", "7", 1.0),
        ("-7", "-7", 1.0),
        ([{"role": "assistant", "content": "7"}], 7, 1.0),
        ("7", 7.0, 1.0),
        ("7", 7.5, 0.0),
        ("78", "7", 0.0),
        ("It is 7", "7", 0.0),
        ("", "7", 0.0),
    ],
)
def test_a_number_is_checked_exactly(completion, answer, reward):
    assert exact_number(completions=[completion], answer=[answer]) == [reward]


def test_gsm8k_s_own_solutions_are_right_and_those_of_others_wrong():
    solutions = [row["answer"] for row in GSM8K]
    numbers = [final_number(one) for one in solutions]
    assert len(set(numbers)) > 1
    assert None not in numbers
    assert gsm8k_answer(completions=solutions, answer=solutions) == [1.0] * len(GSM8K)
    others = solutions[1:] + solutions[:1]
    expected = [float(one == two) for one, two in zip(numbers, numbers[1:] + numbers[:1])]
    assert gsm8k_answer(completions=others, answer=solutions) == expected


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 + 4 = 7, so #### 7", "7"),
        ("#### 7 and then 8", "7"),
        ("#### $1,234.50", "1234.5"),
        ("first 3, then 1,000 dollars.", "1000"),
        ("-5", "-5"),
        ("#### -$5", "-5"),
        ("#### none", None),
        ("", None),
    ],
)
def test_the_final_number_is_read(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))
    assert gsm8k_answer(completions=[[{"role": "assistant", "content": text}]], answer=[f"#### {number}"]) == [
        float(number is not None)
    ]


def test_answers_that_are_numbers_are_compared_as_such():
    assert gsm8k_answer(completions=["so 7", "7.5", "8"], answer=[7, 7.5, 7.0]) == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    "values",
    [
        [1, None],
        (1.0, True),
        torch.tensor([1.0, 2.0]),
        [torch.tensor(1.0), torch.tensor(False)],
        np.array([True, False]),
        [np.bool_(True), np.float32(0.5)],
        [np.int64(1), Fraction(1, 2)],
    ],
    ids=["none", "tuple", "tensor", "tensors", "array", "numpy", "fraction"],
)
def test_numbers_are_taken(values):
    rewards = checked(lambda **kwargs: values, "f")(completions=["a", "b"])
    assert rewards[0] == 1.0
    assert {type(reward) for reward in rewards} <= {float, type(None)}


@pytest.mark.parametrize(
    "values",
    [[1], [1, math.inf], [1, "2"], [1, math.nan], None, "ab", torch.ones(2, 2), [1, 10**400], [1, 1e39], [1, {}]],
)
def test_what_is_no_number_for_each_completion_is_refused(values):
    with pytest.raises(RewardError, match="the reward function f "):
        checked(lambda **kwargs: values, "f")(completions=["a", "b"])


def test_functions_are_found_in_files_and_in_modules():
    names = [f"{REWARDS}:share_of_lower_case", "parscale_adapt.training.rewards.gsm8k_answer"]
    functions = load_reward_functions(names)
    assert [function.__name__ for function in functions] == ["share_of_lower_case", "gsm8k_answer"]
    assert functions[0](completions=["aB"]) == [1 / 16]
    try_reward_functions(functions, [{"prompt": "1+1=", "answer": "2"}])


def test_a_file_is_run_once_and_its_classes_are_found(tmp_path):
    file = tmp_path / "rewards.py"
    file.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Answer:\n"
        "    text: str\n"
        "runs = []\n"
        "def one(completions, **kwargs):\n"
        "    runs.append(1)\n"
        "    return [Answer] * len(completions)\n"
        "def two(completions, **kwargs):\n"
        "    return [len(runs)] * len(completions)\n"
    )
    one, two = load_reward_functions([f"{file}:one", f"{file}:two"])
    (answer,) = one.__wrapped__(completions=["a"])
    assert pickle.loads(pickle.dumps(answer("a"))) == answer("a")
    assert two(completions=["a"]) == [1.0]


def test_questions_to_which_nobody_had_anything_to_say_count_for_nothing():
    nothing = math.nan
    rewards = torch.tensor([[1.0, nothing], [nothing, nothing], [0.0, 2.0]])
    assert mean_rewards(rewards, torch.tensor([1.0, 0.5]), ["a", "b"]) == {
        "reward": 1.0,
        "num_questions": 2,
        "reward of a": 0.5,
        "reward of b": 2.0,
    }
    assert mean_rewards(rewards[1:2], torch.ones(2), ["a", "b"]) == {"num_questions": 0}
