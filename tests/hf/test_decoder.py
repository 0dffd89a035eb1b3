import pytest
import torch
from support.oracle import logits_by_hand
from support.outputs import close
from support.tiny_models import ARCHITECTURES, random_tokens, tiny_model, with_streams
from transformers import DynamicCache


IMPLEMENTATIONS = ("eager", "sdpa")


def padded(side):
    """Tokens and a mask of three samples, the second and third padded."""
    input_ids, mask = random_tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    for sample, num_padding in ((1, 3), (2, 7)):
        where = slice(0, num_padding) if side == "left" else slice(9 - num_padding, 9)
        input_ids[sample, where] = mask[sample, where] = 0
    return {"input_ids": input_ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def implementations_of(model_type):
    return ("eager",) if model_type == "gpt_oss" else IMPLEMENTATIONS


CASES = [(model_type, name) for model_type in ARCHITECTURES for name in implementations_of(model_type)]


@pytest.mark.parametrize(("model_type", "implementation"), CASES)
def test_streams_equal_one_forward_per_stream_mixed_by_hand(model_type, implementation):
    backbone = tiny_model(model_type, implementation)
    plain = backbone(input_ids=random_tokens()).logits
    model = with_streams(backbone, num_streams=3)
    result = model(input_ids=random_tokens()).logits
    close(result, logits_by_hand(model, model_type, input_ids=random_tokens()))
    assert (result - plain).abs().max() > 0.1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("model_type", "implementation"),
    [("qwen2", "sdpa"), ("qwen2", "eager"), ("mistral", "sdpa"), ("gemma3_text", "sdpa"), ("gpt2", "sdpa")],
)
def test_padding_changes_nothing_at_real_tokens(model_type, implementation, side):
    model = with_streams(tiny_model(model_type, implementation), num_streams=3)
    inputs = padded(side)
    visible = inputs["attention_mask"].bool()
    result = model(**inputs).logits
    assert result.isfinite().all()
    close(result[visible], logits_by_hand(model, model_type, **inputs)[visible])
    for sample in range(3):
        alone = model(input_ids=inputs["input_ids"][sample, visible[sample]].unsqueeze(0)).logits[0]
        close(result[sample, visible[sample]], alone)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("model_type", ["qwen2", "mistral", "gemma3_text"])
def test_every_packed_document_sees_the_whole_prefix_and_no_other_document(model_type, implementation):
    model = with_streams(tiny_model(model_type, implementation), num_streams=2)
    documents = [random_tokens(1, length, seed=length) for length in (7, 1, 4)]
    positions = torch.cat([torch.arange(document.shape[1]) for document in documents]).unsqueeze(0)
    packed = model(input_ids=torch.cat(documents, 1), position_ids=positions, use_cache=False).logits
    alone = [logits_by_hand(model, model_type, input_ids=document) for document in documents]
    close(packed, torch.cat(alone, 1))


def test_packed_documents_stay_apart_under_gradient_checkpointing_with_default_arguments():
    model = with_streams(tiny_model())
    documents = [random_tokens(1, length, seed=length) for length in (7, 4)]
    positions = torch.cat([torch.arange(7), torch.arange(4)]).unsqueeze(0)
    alone = [model(input_ids=document).logits for document in documents]
    model.gradient_checkpointing_enable()
    model.train()
    close(model(input_ids=torch.cat(documents, 1), position_ids=positions).logits, torch.cat(alone, 1))


@pytest.mark.parametrize("model_type", ["qwen2", "gpt2"])
def test_streams_equal_stock_attention_over_a_cache_that_holds_the_prefix(model_type):
    """Without any attention of our own: the prefix as keys and values of a stock cache."""
    model = with_streams(tiny_model(model_type), num_streams=2, aggregator_smoothing=0.0)
    layer_streams = [m for name, m in model.named_modules() if name.endswith("attn.parscale")]
    decoder = tiny_model(model_type).get_decoder()
    input_ids = random_tokens()
    expected = []
    for stream in range(2):
        cache = DynamicCache()
        for index, streams in enumerate(layer_streams):
            kinds = (streams.parscale_prefix_k, streams.parscale_prefix_v)
            cache.update(*(kind["default"].weight[stream].detach().expand(2, -1, -1, -1) for kind in kinds), index)
        expected.append(
            decoder(
                input_ids=input_ids,
                past_key_values=cache,
                attention_mask=torch.ones(2, 3 + 9),
                position_ids=torch.arange(9).expand(2, -1),
            ).last_hidden_state
        )
    rows = []
    streams = model.get_base_model().get_decoder().parscale
    streams.register_forward_pre_hook(lambda module, args: rows.append(args[0]))
    model(input_ids=input_ids)
    close(rows[0], torch.cat(expected))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_values_may_be_of_another_size_than_keys(implementation):
    model = with_streams(tiny_model("deepseek_v3", implementation))
    streams = model.get_base_model().model.layers[0].self_attn.parscale
    assert streams.parscale_prefix_k["default"].weight.shape == (2, 4, 3, 12)
    assert streams.parscale_prefix_v["default"].weight.shape == (2, 4, 3, 6)
    result = model(input_ids=random_tokens()).logits
    close(result, logits_by_hand(model, "deepseek_v3", input_ids=random_tokens()))


def test_a_decoder_whose_output_is_smaller_than_its_hidden_size_works():
    changes = {"word_embed_proj_dim": 16}
    model = with_streams(tiny_model("opt", **changes))
    result = model(input_ids=random_tokens()).logits
    close(result, logits_by_hand(model, "opt", changes, input_ids=random_tokens()))


@pytest.mark.parametrize("num_layers", [19, 24])
def test_backbones_of_many_layers_get_a_prefix_in_each(num_layers):
    model = with_streams(tiny_model(hidden_size=16, intermediate_size=16, num_hidden_layers=num_layers))
    assert sum(name.endswith("self_attn.parscale") for name, _ in model.named_modules()) == num_layers
    changes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": num_layers}
    result = model(input_ids=random_tokens()).logits
    torch.testing.assert_close(
        result, logits_by_hand(model, "qwen2", changes, input_ids=random_tokens()), atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize("num_streams", [2, 4])
@pytest.mark.parametrize("model_type", ["qwen2", "mistral"])
def test_a_sample_gets_the_same_output_in_any_batch(model_type, num_streams):
    model = with_streams(tiny_model(model_type), num_streams)
    input_ids = random_tokens(8, 9)
    together = model(input_ids=input_ids).logits
    for sample in (0, 3, 7):
        close(together[sample], model(input_ids=input_ids[sample : sample + 1]).logits[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("model_type", ["qwen2", "gpt2"])
def test_a_token_changes_no_output_before_it(model_type, implementation):
    model = with_streams(tiny_model(model_type, implementation))
    input_ids = random_tokens()
    before = model(input_ids=input_ids).logits
    for token in (1, 5, 8):
        changed = input_ids.clone()
        changed[:, token] = (changed[:, token] + 1) % 90 + 3
        after = model(input_ids=changed).logits
        close(after[:, :token], before[:, :token])
        assert (after[:, token] - before[:, token]).abs().max() > 1e-2


def test_embeddings_and_a_four_dimensional_mask_may_be_given():
    model = with_streams(tiny_model())
    expected = model(input_ids=random_tokens()).logits
    embeddings = model.get_input_embeddings()(random_tokens())
    for rows in (1, 2):
        mask = torch.ones(rows, 1, 9, 9, dtype=torch.bool).tril()
        close(model(inputs_embeds=embeddings, attention_mask=mask).logits, expected)


def test_positions_of_one_row_serve_the_whole_batch():
    model = with_streams(tiny_model())
    positions = torch.arange(9).unsqueeze(0)
    for use_cache in (True, False):
        result = model(input_ids=random_tokens(), position_ids=positions, use_cache=use_cache).logits
        close(result, model(input_ids=random_tokens()).logits)


def test_a_decoder_called_by_position_gives_the_same():
    model = with_streams(tiny_model())
    decoder = model.get_base_model().get_decoder()
    inputs = padded("left")
    expected = decoder(**inputs).last_hidden_state
    assert torch.equal(decoder(*inputs.values()).last_hidden_state, expected)


def test_a_tuple_is_returned_on_request_with_the_cache_of_the_caller():
    model, cache = with_streams(tiny_model()), DynamicCache()
    expected = model(input_ids=random_tokens()).logits
    logits, returned = model(input_ids=random_tokens(), past_key_values=cache, return_dict=False)
    assert torch.equal(logits, expected)
    assert returned is cache
    states, returned = model.get_base_model().model(random_tokens(), use_cache=True, return_dict=False)
    assert torch.equal(model.get_output_embeddings()(states), expected)
    assert type(returned) is DynamicCache


@pytest.mark.parametrize("num_streams", [1, 2, 8])
def test_the_lm_head_sees_as_many_rows_as_the_batch(num_streams):
    model = with_streams(tiny_model(), num_streams)
    shapes = []
    model.get_base_model().lm_head.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
    model(input_ids=random_tokens(3, 5), labels=random_tokens(3, 5))
    assert shapes == [(3, 5, 32)]


def test_only_the_last_logits_are_computed_on_request():
    model = with_streams(tiny_model())
    inputs = padded("left")
    close(model(**inputs, logits_to_keep=1).logits, model(**inputs).logits[:, -1:])


def test_the_balancing_loss_of_experts_counts_the_tokens_of_all_streams():
    model = with_streams(tiny_model("qwen3_moe"))
    inputs, shares = padded("left"), []
    visible = inputs["attention_mask"].bool().repeat(2, 1).flatten()
    for module in model.modules():
        if type(module).__name__ == "Qwen3MoeTopKRouter":
            module.register_forward_hook(lambda module, args, output: shares.append(output[0].float()[visible]))
    loss = model(**inputs, labels=inputs["input_ids"], output_router_logits=True).aux_loss
    probabilities = torch.softmax(torch.cat(shares), -1)
    chosen = torch.zeros_like(probabilities).scatter(1, probabilities.topk(2).indices, 1.0)
    torch.testing.assert_close(loss, 4 * (chosen.mean(0) * probabilities.mean(0)).sum())
