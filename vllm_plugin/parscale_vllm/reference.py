"""At start-up what is served is compared with the logits that `parscale export` wrote down, on the cache that is served."""

import json
import logging
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import cached_file
from vllm.config import set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.platforms import current_platform
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.utils import select_common_block_size


logger = logging.getLogger("vllm.parscale")

REFERENCE_FILE = "reference_logits.safetensors"
# Half-precision kernels of two programs round at other places, and a program that serves in a narrower dtype than the
# export's has no measured tolerance: so many times the dtype's rounding of the largest logit is allowed then.
_ROUNDINGS = 16


@dataclass(frozen=True)
class Reference:
    """The contents of a reference file.

    Args:
        tensors: prompts, padded on the left, and their logits.
        tolerances: largest difference that the export allows, by the end of the logits' names.
    """

    tensors: dict[str, torch.Tensor]
    tolerances: dict[str, float]

    def rows(self, kind: str) -> list[tuple[torch.Tensor, int, torch.Tensor]]:
        """Of every prompt: its tokens `[T]`, how many of the last ones are compared, and their logits `[N, V]`."""
        found = []
        for name in (name for name in self.tensors if name.endswith("input_ids")):
            beginning, tokens = name.removesuffix("input_ids"), self.tensors[name]
            is_token = self.tensors.get(f"{beginning}attention_mask", torch.ones_like(tokens)).bool()
            compared = self.tensors.get(f"{beginning}compared", torch.ones_like(tokens)).bool()
            counts = compared.sum(-1).tolist()
            logits = self.tensors[beginning + kind].float().split(counts)
            found += zip((row[mask] for row, mask in zip(tokens, is_token)), counts, logits)
        return found


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


def verify(model: Any, reference: Reference) -> None:
    """Compare a model with its reference, on blocks of the bound cache that no request has taken yet.

    Raises:
        ValueError: its logits differ.
    """
    dtype = model.model_config.dtype
    kind = "logits_float32" if dtype is torch.float32 and "logits_float32" in reference.tolerances else "logits"
    run = ScratchRun(model)
    largest, differences = 0.0, []
    with torch.no_grad(), set_current_vllm_config(model.vllm_config), current_platform.inference_mode():
        for tokens, num_compared, expected in reference.rows(kind):
            if len(tokens) > run.num_tokens:
                continue
            logits = run.logits(tokens, num_compared)
            if logits is not None:  # ranks but the first may get none
                differences.append(float((logits - expected).abs().max()))
                largest = max(largest, float(expected.abs().max()))
    allowed = max(reference.tolerances[kind], _ROUNDINGS * torch.finfo(dtype).eps * largest)
    if differences and not max(differences) <= allowed:  # true for no number, too
        raise ValueError(
            f"What vLLM would serve is not what was exported: logits of the reference prompts are off by "
            f"{max(differences):.3g}, and {allowed:.3g} is allowed in {str(dtype).removeprefix('torch.')}; check the export "
            "with `parscale verify`, and report it with the versions of vLLM and parscale-vllm."
        )
    logger.info(
        "Verified on %d prompts in %d streams: logits are off by %.3g at most, %.3g is allowed.",
        len(differences),
        model.layout.num_streams,
        max(differences, default=0.0),
        allowed,
    )


class ScratchRun:
    """Runs single prompts through a model behind the prefix of its cache.

    `num_tokens` is the length for which the cache has room.
    """

    def __init__(self, model: Any):
        self.model, self.config = model, model.vllm_config
        layer = model.attention_layers[0]
        self.first_slot = layer.first_free_block * self.config.cache_config.block_size
        self.num_tokens = layer.num_slots - self.first_slot
        spec = layer.get_kv_cache_spec(self.config)
        self.block_size = select_common_block_size(spec.block_size, [layer.attn_backend], [spec])
        self.names = [layer.layer_name for layer in model.attention_layers]
        self.device = layer.kv_cache.device
        self.builder = layer.attn_backend.get_builder_cls()(
            spec.copy_with_new_block_size(self.block_size), self.names, self.config, self.device
        )

    def logits(self, tokens: torch.Tensor, num_compared: int) -> torch.Tensor | None:
        """Logits `[num_compared, V]` of the last tokens of a prompt `[T]`, in float32 on the CPU."""
        num_tokens = len(tokens)
        slots = torch.arange(self.first_slot, self.first_slot + num_tokens, device=self.device)
        metadata = self.builder.build(0, self._batch_of_one(num_tokens, slots))
        with set_forward_context(
            dict.fromkeys(self.names, metadata),
            self.config,
            num_tokens=num_tokens,
            slot_mapping=dict.fromkeys(self.names, slots),
        ):
            positions = torch.arange(num_tokens, device=self.device)
            hidden_states = self.model(tokens.to(self.device), positions)
        logits = self.model.compute_logits(hidden_states[-num_compared:])
        return None if logits is None else logits.float().cpu()

    def _batch_of_one(self, num_tokens: int, slots: torch.Tensor) -> CommonAttentionMetadata:
        first_block = self.first_slot // self.block_size
        blocks = torch.arange(first_block, first_block + cdiv(num_tokens, self.block_size), dtype=torch.int32)
        starts, lengths = (torch.tensor(values, dtype=torch.int32) for values in ([0, num_tokens], [num_tokens]))
        return CommonAttentionMetadata(
            query_start_loc=starts.to(self.device),
            query_start_loc_cpu=starts,
            seq_lens=lengths.to(self.device),
            seq_lens_cpu_upper_bound=lengths,
            num_reqs=1,
            num_actual_tokens=num_tokens,
            max_query_len=num_tokens,
            max_seq_len=num_tokens,
            block_table_tensor=blocks[None].to(self.device),
            slot_mapping=slots,
        )
