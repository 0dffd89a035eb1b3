"""An independent road to the output of P streams: one plain forward per stream, mixed by hand in numpy.

Its attention is written here from the paper's section 2 and shares no code with the package; what streams differ by,
shared LoRA and the aggregator are read by their names in an adapter file. LoRA and biases are put into the weights of
a plain backbone by hand.
"""

import math

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from parscale_adapt import ParScaleConfig
from support.tiny_models import tiny_model


_prefixes: dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}


def _attention(module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs):
    num_rows, num_heads, num_queries, size = query.shape
    key_head = [head // (num_heads // key.shape[1]) for head in range(num_heads)]
    outputs = []
    for head in range(num_heads):
        keys, values = key[:, key_head[head]], value[:, key_head[head]]
        visible = attention_mask[:, 0]
        if module in _prefixes:
            prefix_key, prefix_value = (
                prefix[key_head[head]].expand(num_rows, -1, -1) for prefix in _prefixes[module]
            )
            keys, values = torch.cat([prefix_key, keys], 1), torch.cat([prefix_value, values], 1)
            visible = torch.cat([visible.new_zeros(visible.shape[0], num_queries, prefix_key.shape[1]), visible], 2)
        scores = query[:, head] @ keys.transpose(1, 2) * (1 / math.sqrt(size) if scaling is None else scaling)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores + visible
        if hasattr(module, "sinks"):
            scores = torch.cat([scores, module.sinks[head].expand(num_rows, num_queries, 1)], 2)
        weights = torch.softmax(scores, -1)[..., : keys.shape[1]]
        outputs.append(weights @ values)
    return torch.stack(outputs, 2), None


AttentionInterface.register("oracle", _attention)
AttentionMaskInterface.register("oracle", eager_mask)


def file_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """The tensors of the active adapter by their names in a file, relative to the backbone."""
    tensors = get_peft_model_state_dict(model, adapter_name=model.active_adapter)
    return {name.removeprefix("base_model.model."): tensor.detach() for name, tensor in tensors.items()}


def mix_by_hand(hidden_states: list[torch.Tensor], tensors: dict[str, torch.Tensor], smoothing: float) -> torch.Tensor:
    """`P` hidden states `[B, T, H]` to `[B, T, H]`, token by token."""
    weight = {name.partition("parscale_aggregator.")[2]: tensor.numpy() for name, tensor in tensors.items()}
    streams = np.stack([states.detach().numpy() for states in hidden_states])
    mixed = np.empty_like(streams[0])
    for index in np.ndindex(mixed.shape[:2]):
        at_token = streams[(slice(None), *index)]
        if "0.weight" in weight:
            hidden = weight["0.weight"] @ at_token.T.reshape(-1) + weight["0.bias"]
            logits = weight["2.weight"] @ (hidden / (1 + np.exp(-hidden))) + weight["2.bias"]
        else:
            logits = weight.get("weight_logits", np.zeros(len(streams)))
        shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        mixed[index] = (shares * (1 - smoothing) + smoothing / len(shares)) @ at_token
    return torch.from_numpy(mixed)


@torch.no_grad()
def edit_weights(
    backbone: PreTrainedModel, tensors: dict[str, torch.Tensor], config: ParScaleConfig, stream: int
) -> None:
    """Put shared LoRA, and the LoRA and biases of one stream, into the weights of a plain backbone."""
    for name, module in list(backbone.named_modules()):
        change = torch.zeros(())
        if f"{name}.lora_A.weight" in tensors:
            product = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
            change = change + product * config.lora.lora_alpha / config.lora.r
        if f"{name}.parscale_lora_A" in tensors:
            product = tensors[f"{name}.parscale_lora_B"][stream] @ tensors[f"{name}.parscale_lora_A"][stream]
            change = change + product * config.stream_lora_alpha / config.stream_lora_rank
        if change.dim():
            module.weight += change.T if type(module).__name__ == "Conv1D" else change
        if f"{name}.parscale_bias" in tensors:
            bias = tensors[f"{name}.parscale_bias"][stream]
            module.bias = torch.nn.Parameter(bias if module.bias is None else module.bias + bias)


@torch.no_grad()
def logits_by_hand(
    model: PeftModel, model_type: str = "qwen2", changes: dict | None = None, implementation: str = "oracle", **inputs
) -> torch.Tensor:
    """Logits of `model`, an adapter on `tiny_model(model_type, **changes)`, from one forward per stream."""
    tensors = file_tensors(model)
    config = model.peft_config[model.active_adapter]
    hidden_states = []
    for stream in range(config.num_streams):
        backbone = tiny_model(model_type, implementation, **(changes or {}))
        edit_weights(backbone, tensors, config, stream)
        for name, module in backbone.named_modules():
            if f"{name}.parscale_prefix_k" in tensors:
                _prefixes[module] = tuple(tensors[f"{name}.parscale_prefix_{kind}"][stream] for kind in "kv")
        hidden_states.append(backbone.get_decoder()(**inputs, use_cache=False).last_hidden_state)
    _prefixes.clear()
    if config.num_streams == 1:
        return backbone.get_output_embeddings()(hidden_states[0])
    return backbone.get_output_embeddings()(mix_by_hand(hidden_states, tensors, config.aggregator_smoothing))
