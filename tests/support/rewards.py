"""Reward functions for tests, good ones and bad ones."""

from parscale_adapt.training.rewards import text_of


def share_of_lower_case(completions, **kwargs):
    """Learned within a few steps, since each answer has some."""
    return [sum(letter.islower() for letter in text_of(one)) / 16 for one in completions]


def mentions_answer(completions, answer, **kwargs):
    return [float(right in text_of(one)) for one, right in zip(completions, answer, strict=True)]


def one_too_few(completions, **kwargs):
    return [0.0] * (len(completions) - 1)


def not_a_number(completions, **kwargs):
    return [float("nan")] * len(completions)


def words(completions, **kwargs):
    return ["good"] * len(completions)


def no_list(completions, **kwargs):
    return 1.0


def needs_column(completions, solution, **kwargs):
    return [0.0] * len(completions)


def no_keywords(completions):
    return [0.0] * len(completions)


def fails(completions, **kwargs):
    raise KeyError("gold")


async def later(completions, **kwargs):
    return [0.0] * len(completions)


NOT_A_FUNCTION = 3
