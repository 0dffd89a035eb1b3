"""Plain backbones of one shape with random weights, and random tokens for them."""

import argparse

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM


def build_backbone(args: argparse.Namespace) -> Qwen2ForCausalLM:
    """Random weights; `intermediate_size` and `num_heads` may be left out, as scripts for small shapes do."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=getattr(args, "intermediate_size", None) or args.hidden_size * 8 // 3 // 32 * 32,
        num_hidden_layers=args.num_layers,
        num_attention_heads=getattr(args, "num_heads", None) or args.hidden_size // 64,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    with torch.device(args.device):
        return Qwen2ForCausalLM(config).to(getattr(torch, args.dtype)).train()


def random_ids(args: argparse.Namespace, num_rows: int) -> torch.Tensor:
    return torch.randint(args.vocab_size, (num_rows, args.seq_len), device=args.device)
