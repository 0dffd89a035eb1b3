"""Adapters as they are after training, and a few steps of gradient descent."""

import torch

from support.tiny_models import random_tokens


@torch.no_grad()
def stirred(model, size=0.2, seed=5):
    """Every tensor that is trained has moved, each its own way."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return model.eval()


def descend(model, num_steps, learning_rate=0.05):
    """Loss and gradients of each step, by name; the model has moved afterwards."""
    model.train()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    results = []
    for _ in range(num_steps):
        model.zero_grad()
        loss = model(input_ids=random_tokens(), labels=random_tokens()).loss
        loss.backward()
        results.append((loss.item(), {name: parameter.grad.clone() for name, parameter in trained.items()}))
        with torch.no_grad():
            for parameter in trained.values():
                parameter -= learning_rate * parameter.grad
    model.eval()
    return results
