"""Do prefixes in the linear-attention layers of a hybrid pay? Learned start states on a tiny Qwen3-Next, and the table.

    python scripts/hybrid_states.py     # some 20 minutes on one core

In a hybrid, ParScale puts prefixes into the layers with full attention; layers with a recurrent state have no keys that a
prefix could stand beside. Their counterpart is a learned state `[P, heads, key_size, value_size]` from which each stream
reads its text, what any number of virtual tokens would leave there. A backbone of three linear layers for each full one
is trained on the text of `law_lab.py` and frozen; then four streams are trained on more of it, with and without such
states, from the same start (states of zero change nothing), at the best of three rates each.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import law_lab
import torch
from evidence_rows import FINISHED, Table, shared_columns
from peft import get_peft_model
from torch import nn
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from parscale_adapt import ParScaleConfig


ROOT = Path(__file__).resolve().parents[1]
NUM_STREAMS = 4
SEQUENCE_LENGTH, BATCH_SIZE = 128, 8
BACKBONE_STEPS, STEPS = 1200, 200
BACKBONE_RATE = 3e-3
PREFIX_RATE, AGGREGATOR_RATE = 1e-2, 3e-4
STATE_RATES = (1e-3, 1e-2, 1e-1)
SEEDS = (0, 1, 2)
HELDOUT_ROWS = 128
COLUMNS = (
    "variant", "seed", "status", "state_rate", "backbone_loss", "loss_before", "loss", "trained_params", "tokens", "data",
    "machine", "versions",
)  # fmt: skip


class StartStates(nn.Module):
    """A learned recurrent state for each stream and linear-attention layer, from which every sequence starts.

    Args:
        model: with streams; its linear layers are changed.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        layers = [module for module in model.modules() if isinstance(module, qwen3_next.Qwen3NextGatedDeltaNet)]
        shape = (NUM_STREAMS, layers[0].num_v_heads, layers[0].head_k_dim, layers[0].head_v_dim)
        self.states = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for _ in layers)
        for layer, state in zip(layers, self.states):
            layer.forward = self._starting_from(state, layer.forward)

    @staticmethod
    def _starting_from(state: torch.Tensor, forward):
        def with_state(hidden_states: torch.Tensor, *args, **kwargs):
            with _initial_state(state.repeat_interleave(len(hidden_states) // NUM_STREAMS, 0)):  # stream-major rows
                return forward(hidden_states, *args, **kwargs)

        return with_state


@contextmanager
def _initial_state(state: torch.Tensor) -> Iterator[None]:
    """Let the recurrence begin from `[rows, heads, key_size, value_size]` instead of zeros."""
    rule = qwen3_next.torch_chunk_gated_delta_rule

    def from_state(*args, initial_state=None, **kwargs):
        return rule(*args, initial_state=state, **kwargs)

    qwen3_next.torch_chunk_gated_delta_rule = from_state
    try:
        yield
    finally:
        qwen3_next.torch_chunk_gated_delta_rule = rule


def new_backbone() -> Qwen3NextForCausalLM:
    """Four layers of which the last has full attention, with random weights."""
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=law_lab.VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        decoder_sparse_step=1,
        mlp_only_layers=[0, 1, 2, 3],
        num_experts=2,
        num_experts_per_tok=1,
        tie_word_embeddings=True,
        use_cache=False,
        initializer_range=0.6 / 8,
    )
    return Qwen3NextForCausalLM(config)


def train(model: nn.Module, groups: list[dict], tokens: torch.Tensor, steps: int) -> None:
    """AdamW with a linear warm-up of a tenth and a linear decay to 0."""
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    factor = lambda step: min((step + 1) / (steps // 10), (steps - step) / (steps - steps // 10))  # noqa: E731
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    parameters = [parameter for group in groups for parameter in group["params"]]
    model.train()
    for ids in tokens[: steps * BATCH_SIZE * SEQUENCE_LENGTH].long().view(steps, BATCH_SIZE, SEQUENCE_LENGTH):
        model(input_ids=ids, labels=ids).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


@torch.no_grad()
def heldout_loss(model: nn.Module, tokens: torch.Tensor) -> float:
    """Mean cross-entropy, in nats per token."""
    model.eval()
    rows = tokens[: HELDOUT_ROWS * SEQUENCE_LENGTH].long().view(-1, SEQUENCE_LENGTH)
    return torch.stack([model(input_ids=ids, labels=ids).loss for ids in rows.split(16)]).mean().item()


def run(backbone: nn.Module, text: law_lab.Text, state_rate: float | None, seed: int) -> dict[str, object]:
    """Train streams on a copy of the backbone; `state_rate` is that of start states, None for none."""
    torch.manual_seed(seed)
    model = get_peft_model(
        copy.deepcopy(backbone), ParScaleConfig(num_streams=NUM_STREAMS, num_prefix_tokens=8, init_weights="tokens")
    )
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for name, p in named if "aggregator" not in name], "lr": PREFIX_RATE},
        {"params": [p for name, p in named if "aggregator" in name], "lr": AGGREGATOR_RATE},
    ]
    if state_rate is not None:
        groups.append({"params": list(StartStates(model).parameters()), "lr": state_rate})
    before = heldout_loss(model, text.heldout)
    first = BACKBONE_STEPS * BATCH_SIZE * SEQUENCE_LENGTH  # text that the backbone has not seen
    train(model, groups, text.train[first:], STEPS)
    return {
        "variant": "prefixes" if state_rate is None else f"prefixes and start states, {state_rate:g}",
        "seed": seed,
        "status": FINISHED,
        "state_rate": "" if state_rate is None else state_rate,
        "loss_before": before,
        "loss": heldout_loss(model, text.heldout),
        "trained_params": sum(p.numel() for group in groups for p in group["params"]),
        "tokens": STEPS * BATCH_SIZE * SEQUENCE_LENGTH,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=ROOT / "docs" / "evidence" / "hybrid.csv")
    parser.add_argument("--text", type=Path, default=ROOT / "runs" / "evidence" / "law_lab.safetensors")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text = law_lab.load_text(arguments.text)
    shared = shared_columns(text.fingerprint, torch.device("cpu"))
    table = Table(arguments.csv, shared, COLUMNS, ("state_rate", "seed"))
    todo = [(rate, seed) for seed in SEEDS for rate in (None, *STATE_RATES)]
    todo = [(rate, seed) for rate, seed in todo if not table.has("" if rate is None else rate, seed)]
    if not todo:
        return
    backbone = new_backbone()
    train(backbone, [{"params": list(backbone.parameters()), "lr": BACKBONE_RATE}], text.train, BACKBONE_STEPS)
    loss = heldout_loss(backbone, text.heldout)
    print(f"backbone: {loss:.4f}", flush=True)
    for rate, seed in todo:
        row = run(backbone, text, rate, seed)
        table.add({**row, "backbone_loss": loss})
        print(f"{row['variant']}, seed {seed}: {row['loss_before']:.4f} to {row['loss']:.4f}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
