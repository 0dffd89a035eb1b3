import pytest
import torch
from support.tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from parscale_adapt.hf.fingerprint import backbone_fingerprint, describe_difference


def with_random_vectors(model):
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter)
    return model


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def checkpoint(request, tmp_path):
    """A checkpoint on disk, and the dtypes in which it must agree with itself."""
    model = with_random_vectors(tiny_model(vocab_size=997))
    with torch.no_grad():  # just below the smallest sampled value, which half precision rounds up to it
        model.model.embed_tokens.weight[:100] = 2.0**-13 * (1 - 2.0**-10)
    model.to(request.param).save_pretrained(tmp_path)
    agreeing = {torch.float32: [torch.float32, torch.bfloat16], torch.bfloat16: list(PRECISIONS)}
    return tmp_path, agreeing.get(request.param, list(PRECISIONS))


PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)


def fingerprint_of(folder, dtype):
    return backbone_fingerprint(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))


def test_a_checkpoint_agrees_with_itself_in_other_dtypes(checkpoint):
    folder, dtypes = checkpoint
    fingerprints = [fingerprint_of(folder, dtype) for dtype in dtypes]
    for first in fingerprints:
        for second in fingerprints:
            assert describe_difference(first, second) is None


def test_a_float32_checkpoint_agrees_with_itself_loaded_in_float16(tmp_path):
    with_random_vectors(tiny_model(vocab_size=997)).save_pretrained(tmp_path)
    first, second = fingerprint_of(tmp_path, torch.float32), fingerprint_of(tmp_path, torch.float16)
    assert describe_difference(first, second) is None
    assert describe_difference(second, first) is None


def test_other_weights_of_the_same_shape_differ():
    first, second = (backbone_fingerprint(tiny_model(seed=seed)) for seed in (0, 1))
    assert describe_difference(first, second) == "its weights differ (first in `model.embed_tokens.weight`)"


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_training_an_embedding_or_a_norm_is_noticed(name):
    model = tiny_model()
    before = backbone_fingerprint(model)
    with torch.no_grad():
        model.get_parameter(name).mul_(1.05)
    assert describe_difference(before, backbone_fingerprint(model)) == f"its weights differ (first in `{name}`)"


@pytest.mark.parametrize(
    ("model_type", "size"),
    [("qwen2", {"hidden_size": 16}), ("gpt2", {"hidden_size": 16}), ("qwen2", {"vocab_size": 99})],
)
def test_another_shape_is_named(model_type, size):
    first, second = (backbone_fingerprint(tiny_model(model_type, **changes)) for changes in ({}, size))
    (value,) = size.values()
    found, _, expected = describe_difference(first, second).partition(" instead of ")
    assert f'": {value}' in found
    assert f'": {value}' not in expected


@pytest.mark.parametrize("tied", [False, True])
def test_it_is_short_and_reads_only_the_embedding_and_three_vectors(tied):
    fingerprint = backbone_fingerprint(tiny_model(tie_word_embeddings=tied))
    assert len(fingerprint) == 5
    assert "model.embed_tokens.weight" in fingerprint
    assert len(str(fingerprint)) < 800


def test_computing_it_changes_nothing():
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    backbone_fingerprint(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
