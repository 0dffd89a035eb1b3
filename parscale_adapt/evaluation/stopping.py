"""Where written answers end: at a sequence, in each row by itself."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria


class StopInEachRow(StoppingCriteria):
    """Ends those rows, beams or samples, that have written one of some sequences behind their prompt.

    Args:
        tokenizer: of the rows.
        sequences: end a row.
        num_prompt_tokens: that each row begins with.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sequences: Sequence[str], num_prompt_tokens: int):
        self.tokenizer = tokenizer
        self.sequences = [sequence for sequence in sequences if sequence]
        self.num_prompt_tokens = num_prompt_tokens
        lengths = [len(tokenizer.encode(sequence, add_special_tokens=False)) for sequence in self.sequences]
        self._num_looked_at = max(lengths, default=0) + 2  # a sequence may be written in other tokens than its own

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Whether each row is done: bool `[rows]`."""
        written = self.tokenizer.batch_decode(input_ids[:, self.num_prompt_tokens :][:, -self._num_looked_at :])
        done = [any(sequence in text for sequence in self.sequences) for text in written]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)
