"""Image prompts: the text decoder of a vision-language model runs in streams, images enter it as they do without."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from support.outputs import GREEDY
from torch import nn
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
)

from parscale_adapt import ParScaleConfig


IMAGE, BEGIN, END = 90, 91, 92
TEXT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}


@pytest.fixture(autouse=True)
def _scripts_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))


def gemma3(implementation, model_class=Gemma3ForConditionalGeneration):
    """One layer with a window of 6 and one without, in both of which the tokens of an image see each other."""
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={**TEXT, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
        vision_config={**vision, "image_size": 32, "patch_size": 8},
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=BEGIN,
        eoi_token_index=END,
    )
    model = model_class._from_config(config, attn_implementation=implementation).eval()
    projector = next(module for name, module in model.named_modules() if name.endswith("multi_modal_projector"))
    nn.init.normal_(projector.mm_input_projection_weight)  # it starts at zero
    return model


def qwen2_5_vl(implementation, model_class=Qwen2_5_VLForConditionalGeneration):
    """Positions of three axes."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config={**vision, "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]},
        image_token_id=IMAGE,
        vision_start_token_id=BEGIN,
        vision_end_token_id=END,
    )
    return model_class._from_config(config, attn_implementation=implementation).eval()


def inputs(make):
    """Two prompts with an image each, the first behind two masked tokens."""
    generator = torch.Generator().manual_seed(3)
    input_ids = torch.randint(3, 80, (2, 14), generator=generator)
    for row, start in enumerate((3, 6)):
        input_ids[row, start : start + 6] = torch.tensor([BEGIN, *[IMAGE] * 4, END])
    mask = torch.ones_like(input_ids)
    mask[0, :2] = 0
    kinds = (input_ids == IMAGE).long()
    if make is gemma3:
        images = {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator), "token_type_ids": kinds}
    else:
        patches = torch.randn(2 * 16, 3 * 2 * 4 * 4, generator=generator)
        grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
        images = {"pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": kinds}
    return {"input_ids": input_ids.masked_fill(mask == 0, 0), "attention_mask": mask, **images}


def in_streams(model, task_type="CAUSAL_LM", **fields):
    torch.manual_seed(1)
    config = ParScaleConfig(task_type=task_type, num_streams=3, num_prefix_tokens=3, init_std=0.5, **fields)
    return get_peft_model(model, config).eval()


both = pytest.mark.parametrize("make", [gemma3, qwen2_5_vl])
by_implementation = pytest.mark.parametrize("implementation", ["eager", "sdpa"])


@both
@by_implementation
@torch.no_grad()
def test_an_image_prompt_gives_what_one_plain_forward_per_stream_gives(make, implementation, tmp_path):
    from compatibility_oracle import logits_by_brute_force

    batch = inputs(make)
    real = batch["attention_mask"].bool()
    model = in_streams(make(implementation))
    model.save_pretrained(tmp_path)
    found, plain = model(**batch, use_cache=False).logits, make(implementation)(**batch, use_cache=False).logits
    expected = logits_by_brute_force(make("eager"), tmp_path, batch)
    torch.testing.assert_close(found[real], expected[real], atol=1e-4, rtol=1e-4)
    assert (found - plain)[real].abs().max() > 0.1
    another = {**batch, "pixel_values": batch["pixel_values"].flip(0)}
    assert (model(**another, use_cache=False).logits - found)[real].abs().max() > 0.1, "the image doesn't matter"
    torch.testing.assert_close(model(**batch).logits, found, atol=1e-4, rtol=1e-4)  # with a cache


@both
@by_implementation
@pytest.mark.parametrize("num_beams", [1, 3])
def test_decoding_behind_an_image_gives_the_same_tokens_with_and_without_cache(make, implementation, num_beams):
    model = in_streams(make(implementation))
    cached, uncached = (
        model.generate(**inputs(make), **GREEDY, num_beams=num_beams, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert torch.equal(cached, uncached)


@both
def test_images_are_trained_on_in_chunks_of_streams_with_the_same_gradients(make):
    batch = inputs(make)
    found = {}
    for size in (None, 1):
        model = in_streams(make("sdpa"), stream_chunk_size=size).train()
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        found[size] = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for name, gradient in found[None].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("make", "model_class"), [(gemma3, Gemma3Model), (qwen2_5_vl, Qwen2_5_VLModel)])
@torch.no_grad()
def test_a_model_without_head_gives_the_states_under_the_causal_lm(make, model_class):
    batch = inputs(make)
    causal_lm = in_streams(make("sdpa"))
    model = in_streams(make("sdpa", model_class), "FEATURE_EXTRACTION")
    prefix = "base_model.model."
    state = {name.replace(f"{prefix}model.", prefix): value for name, value in causal_lm.state_dict().items()}
    _, unexpected = model.load_state_dict(state, strict=False)
    assert unexpected == [f"{prefix}lm_head.weight"]
    hidden = model(**batch, use_cache=False).last_hidden_state
    expected = causal_lm(**batch, use_cache=False, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(hidden, expected)
