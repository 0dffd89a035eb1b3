"""Reward functions: what those that ship find, what their answers must be, and by which names they are found."""

import json
import math
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from support.recipe_runs import REWARDS

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


@pytest.mark.parametrize("values", [[1, None], (0.5, True), torch.tensor([1.0, 2.0])], ids=["none", "tuple", "tensor"])
def test_numbers_are_taken(values):
    assert len(checked(lambda **kwargs: values, "f")(completions=["a", "b"])) == 2


@pytest.mark.parametrize("values", [[1], [1, math.inf], [1, "2"], [1, math.nan], None, "ab", torch.ones(2, 2)])
def test_what_is_no_number_for_each_completion_is_refused(values):
    with pytest.raises(RewardError, match="the reward function f "):
        checked(lambda **kwargs: values, "f")(completions=["a", "b"])


def test_functions_are_found_in_files_and_in_modules():
    names = [f"{REWARDS}:share_of_lower_case", "parscale_adapt.training.rewards.gsm8k_answer"]
    functions = load_reward_functions(names)
    assert [function.__name__ for function in functions] == ["share_of_lower_case", "gsm8k_answer"]
    assert functions[0](completions=["aB"]) == [1 / 16]
    try_reward_functions(functions, [{"prompt": "1+1=", "answer": "2"}])
