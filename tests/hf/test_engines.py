import pytest
import torch
from support.outputs import gradients
from support.tiny_models import random_tokens, tiny_model, with_streams
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


def in_4bit(folder):
    tiny_model(**SIZES).save_pretrained(folder)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")


def test_gradients_reach_every_prefix_of_a_4bit_backbone_also_after_an_evaluation(tmp_path):
    """bitsandbytes packs weights for CPUs with AVX512-BF16 in evaluation mode, and loses the gradient there."""
    pytest.importorskip("bitsandbytes")
    model = with_streams(in_4bit(tmp_path))
    expected = gradients(model)
    with torch.no_grad():
        model.eval()(input_ids=random_tokens())
    assert gradients(model).keys() == expected.keys()
    assert len(expected) == 2 * 2 + 4
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name])
        assert gradient.abs().max() > 0, name
