"""The logits that `parscale export` wrote down of its source."""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from transformers.utils import cached_file


logger = logging.getLogger("vllm.parscale")

REFERENCE_FILE = "reference_logits.safetensors"


class Row(NamedTuple):
    """One prompt `[T]`, and the logits `[N, V]` of its last tokens."""

    tokens: torch.Tensor
    logits: torch.Tensor


@dataclass(frozen=True)
class Reference:
    """The contents of a reference file.

    Args:
        tensors: prompts, padded on the left, and their logits.
        tolerances: largest difference that the export allows, by the end of the logits' names.
    """

    tensors: dict[str, torch.Tensor]
    tolerances: dict[str, float]

    def rows(self, kind: str, longest: int) -> Iterator[Row]:
        """Every prompt of up to `longest` tokens, without its padding."""
        for name in (name for name in self.tensors if name.endswith("input_ids")):
            beginning, tokens = name.removesuffix("input_ids"), self.tensors[name]
            is_token = self.tensors.get(f"{beginning}attention_mask", torch.ones_like(tokens)).bool()
            compared = self.tensors.get(f"{beginning}compared", torch.ones_like(tokens)).bool()
            logits = self.tensors[beginning + kind].float().split(compared.sum(-1).tolist())
            rows = (Row(row[mask], of_row) for row, mask, of_row in zip(tokens, is_token, logits))
            yield from (row for row in rows if len(row.tokens) <= longest)


def find_reference(model_config: Any) -> Reference | None:
    """The reference of an export; None for the authors' own checkpoints, which have none.

    Raises:
        ValueError: a standalone export lacks it.
    """
    path = cached_file(
        model_config.model,
        REFERENCE_FILE,
        revision=model_config.revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        if "version" in model_config.hf_config.parscale:
            raise ValueError(
                f"{model_config.model} lacks {REFERENCE_FILE}, without which nothing shows that the streams are served: "
                "get the whole folder that `parscale export` made."
            )
        logger.warning("%s holds no reference logits, so what is served is not verified.", model_config.model)
        return None
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tolerances = json.loads(metadata.get("tolerances", "{}")) or {"logits": float(metadata["tolerance"])}
        return Reference({name: file.get_tensor(name) for name in file.keys()}, tolerances)  # noqa: SIM118
