"""What a model says, and how far from what is expected it may be."""

import torch

from support.tiny_models import random_tokens


GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def close(result: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(result, expected, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def logits(model: torch.nn.Module, **inputs) -> torch.Tensor:
    """For the usual tokens `[2, 9]`, or for `inputs`."""
    return model(**{"input_ids": random_tokens()} | inputs).logits


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Of every parameter that has one, for the loss of the usual tokens in training mode."""
    model.train()
    model.zero_grad()
    model(input_ids=random_tokens(), labels=random_tokens()).loss.backward()
    model.eval()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def generate(model: torch.nn.Module, num_samples: int = 2, **options) -> torch.Tensor:
    """Six tokens behind eight, left-padded unless for one sample, seeded, greedily unless `options` say otherwise."""
    input_ids = random_tokens(num_samples, 8)
    mask = torch.ones_like(input_ids)
    if num_samples > 1:
        mask[0, :3] = 0
    torch.manual_seed(0)
    return model.generate(input_ids=input_ids, attention_mask=mask, **GREEDY | options)
