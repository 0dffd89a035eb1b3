"""The logits of reference prompts, on both sides of a comparison. As a script, a stranger's side:

    python fresh_process.py FOLDER REFERENCE OUTPUT [PACKAGE]

loads a checkpoint as somebody would who knows nothing of this package, and writes what it computes. With PACKAGE, a
module to import first, the checkpoint needs it (the published layout); without, transformers loads what the folder
holds, its code included, and this package stays out.
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers import AutoModelForCausalLM, PreTrainedModel


# What is kept of every batch, by the end of its name in a reference file, and the dtype that it is computed in.
LOGITS = {"logits": None, "logits_float32": torch.float32}
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CASTS = ("half", "bfloat16", "float")
_MAX_WIDENED = 2**20  # values of a matrix at a time
_WITHOUT_FLOAT64 = ("grouped_mm", "_grouped_mm")  # PyTorch has no such kernel of them


class ComputingIn(TorchFunctionMode):
    """Inside it every function of torch sees and asks for `dtype` instead of narrower floating types.

    Weights are widened where they are used, matrices a few rows at a time. A model computes what a copy of it in `dtype`
    would, without the memory for the copy.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self._dtype = dtype
        self._narrower = {other for other in _FLOATING if other.itemsize < dtype.itemsize}

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":  # of an attribute such as `shape`, for which no weight needs to be widened
            is_dtype = func == torch.Tensor.dtype.__get__  # type: ignore[attr-defined]
            return self._widened(func(*args)) if is_dtype else func(*args)
        if name in _CASTS:
            return args[0].to(self._dtype)
        if func is F.embedding:  # the rows that it looks up, and not the whole table
            return self._widened(func(*args, **(kwargs or {})))
        if func is F.linear:
            return self._linear(*args, **(kwargs or {}))
        if name in _WITHOUT_FLOAT64 and self._dtype is torch.float64:
            args, kwargs = tree_map(_in_float32, (args, kwargs or {}))
            return func(*args, **kwargs).double()
        args, kwargs = tree_map(self._widened, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _linear(self, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        inputs, bias = self._widened(inputs), self._widened(bias)
        if weight.dtype not in self._narrower:
            return F.linear(inputs, weight, bias)
        num_rows = min(len(weight), max(1, _MAX_WIDENED // weight.shape[-1]))
        # One for all blocks, so that memory stays whole.
        rows = weight.new_empty(num_rows, weight.shape[-1], dtype=self._dtype)
        output = inputs.new_empty(*inputs.shape[:-1], len(weight))
        for start in range(0, len(weight), num_rows):
            block = slice(start, min(start + num_rows, len(weight)))
            widened = rows[: block.stop - start].copy_(weight[block])
            output[..., block] = F.linear(inputs, widened, None if bias is None else bias[block])
        return output

    def _widened(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dtype in self._narrower:
            return value.to(self._dtype)
        return self._dtype if isinstance(value, torch.dtype) and value in self._narrower else value


def _in_float32(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@torch.no_grad()
def compute_logits(
    model: PreTrainedModel, batch: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Logits `[N, vocabulary]` on the CPU, computed in `dtype` or, without it, as the model is.

    Args:
        model: the causal LM.
        batch: `input_ids` `[B, T]`, optionally `attention_mask`, and `compared` `[B, T]`, which says the N positions;
            all of them without it.
        dtype: not narrower than that of the model.
    """
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask") if name in batch}
    with nullcontext() if dtype is None else ComputingIn(dtype):
        logits = model(**inputs, use_cache=False).logits.cpu()
    return logits[batch.get("compared", torch.ones_like(batch["input_ids"])).bool()]


def split_batches(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """The batches of a reference file by the beginning of their names: `short.input_ids` is of `short.`."""
    batches: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        beginning, separator, end = name.rpartition(".")
        batches.setdefault(beginning + separator, {})[end] = tensor
    return batches


def compute_as_asked(model: PreTrainedModel, reference: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The logits that a reference file holds, under the same names, as another model computes them."""
    return {
        beginning + kind: compute_logits(model, batch, dtype).contiguous()
        for beginning, batch in split_batches(reference).items()
        for kind, dtype in LOGITS.items()
        if kind in batch
    }


def main(folder: str, reference: str, output: str, package: str | None = None) -> None:
    """Load, compute, write."""
    if package is not None:
        importlib.import_module(package)
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=package is None, dtype="auto", output_loading_info=True
    )
    problems = {kind: sorted(names) for kind, names in info.items() if names}
    if problems:
        sys.exit(f"its tensors are not those of the model: {problems}")
    if package is None and "parscale_adapt" in sys.modules:
        sys.exit("its code imports parscale_adapt")
    save_file(compute_as_asked(model.eval(), load_file(reference)), output)


if __name__ == "__main__":
    main(*sys.argv[1:])
