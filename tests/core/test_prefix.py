import numpy as np
import pytest
import torch

from parscale_adapt.core.prefix import ReparameterizedPrefix, StreamPrefix


SHAPE = (3, 2, 4, 6)  # streams, heads, prefix tokens, size
P, HEADS, N, SIZE = SHAPE


def test_a_prefix_starts_normal():
    prefix = StreamPrefix((4, 4, 48, 32))
    prefix.reset_parameters(0.02)
    assert prefix.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert prefix.weight.mean().item() == pytest.approx(0, abs=0.001)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prefix_is_handed_out_as_a_tensor_of_its_own(dtype):
    prefix = StreamPrefix(SHAPE)
    prefix.reset_parameters(1.0)
    handed_out = prefix(dtype)
    assert torch.equal(handed_out, prefix.weight.to(dtype))
    assert handed_out.untyped_storage().data_ptr() != prefix.weight.untyped_storage().data_ptr()


def test_a_reparameterized_prefix_is_an_mlp_of_its_matrix():
    prefix = ReparameterizedPrefix(SHAPE)
    prefix.reset_parameters(0.5)
    torch.nn.init.normal_(prefix.hidden.bias)
    torch.nn.init.normal_(prefix.output.bias)
    parameters = {name: tensor.detach().numpy() for name, tensor in prefix.named_parameters()}
    folded = prefix.folded()
    assert folded.shape == SHAPE
    for stream, head, token in np.ndindex(P, HEADS, N):
        row = parameters["embedding"][stream, token]
        row = np.tanh(parameters["hidden.weight"] @ row + parameters["hidden.bias"])
        row = (parameters["output.weight"] @ row + parameters["output.bias"])[head * SIZE : (head + 1) * SIZE]
        np.testing.assert_allclose(folded[stream, head, token].detach().numpy(), row, atol=1e-5)


def test_a_reparameterized_prefix_equals_its_folded_tensor():
    prefix, plain = ReparameterizedPrefix(SHAPE), StreamPrefix(SHAPE)
    prefix.reset_parameters(0.5)
    plain.weight.data = prefix.folded().detach()
    assert torch.equal(prefix(torch.bfloat16), plain(torch.bfloat16))


def test_every_tensor_of_a_reparameterized_prefix_gets_a_gradient():
    prefix = ReparameterizedPrefix(SHAPE)
    prefix.reset_parameters(0.5)
    prefix(torch.float32).square().sum().backward()
    for name, parameter in prefix.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_a_reparameterized_prefix_starts_with_streams_apart():
    prefix = ReparameterizedPrefix(SHAPE)
    prefix.reset_parameters(0.02)
    folded = prefix.folded()
    assert all((folded[0] - folded[stream]).abs().max() > 0 for stream in range(1, P))
