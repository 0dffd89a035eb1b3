"""Sums of two numbers: a task whose answers can be checked exactly, made without any file."""

from __future__ import annotations

import functools
import random

from datasets import Dataset, DatasetDict


LARGEST_SUM = 9  # so that an answer is one digit, and small models find it by chance
NUM_HELDOUT = 11


@functools.cache
def sums_of_digits() -> DatasetDict:
    """Make all sums of two digits with a result of one digit, in a fixed random order.

    Returns:
        Splits `train` and `heldout` with the columns `prompt` (such as ``3+4=``) and `answer` (``7``); no sum is in
        both.
    """
    pairs = [(one, two) for one in range(10) for two in range(10) if one + two <= LARGEST_SUM]
    random.Random(0).shuffle(pairs)
    rows = [{"prompt": f"{one}+{two}=", "answer": str(one + two)} for one, two in pairs]
    splits = {"train": rows[NUM_HELDOUT:], "heldout": rows[:NUM_HELDOUT]}
    return DatasetDict({name: Dataset.from_list(split) for name, split in splits.items()})
