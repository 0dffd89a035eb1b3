"""Several transforms in one adapter, against each stream alone: a stock model with edited weights, its prefix in a cache."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from support.descent import descend, stirred
from support.names_in_files import IN_FILE
from support.oracle import edit_weights, file_tensors, logits_by_hand, mix_by_hand
from support.outputs import close, logits
from support.tiny_models import ARCHITECTURES, VOCABULARY, random_tokens, tiny_model
from transformers import DynamicCache

from parscale_adapt import ParScaleConfig, grow_streams
from parscale_adapt.analysis.diagnostics import diagnose
from parscale_adapt.core.transforms import STREAM_TRANSFORMS, named_transforms


TOGETHER = [["prefix", "lora"], ["prefix", "bitfit"], ["lora", "bitfit"], ["prefix", "lora", "bitfit"]]
each_together = pytest.mark.parametrize("names", TOGETHER, ids="+".join)


def config(names, num_streams=3, **fields):
    if "prefix" in names:
        fields = {"num_prefix_tokens": 4, **fields}
    return ParScaleConfig(num_streams=num_streams, stream_transform=names, init_std=0.5, **fields)


def adapted(names, model_type="qwen2", **fields):
    torch.manual_seed(1)
    return get_peft_model(tiny_model(model_type), config(names, **fields)).eval()


def trained(names, model_type="qwen2", **fields):
    return stirred(adapted(names, model_type, **fields))


@torch.no_grad()
def logits_of_plain_models(model, model_type="qwen2"):
    """Each stream is a stock model: low-rank weights and biases are in its weights, its prefix is its past."""
    tensors, settings = file_tensors(model), model.peft_config["default"]
    hidden_states = []
    for stream in range(settings.num_streams):
        plain = tiny_model(model_type)
        edit_weights(plain, tensors, settings, stream)
        past, num_past = DynamicCache(config=plain.config), 0
        attentions = (name.rpartition(".")[0] for name in tensors if name.endswith("parscale_prefix_k"))
        for layer, host in enumerate(sorted(attentions)):
            key, value = (tensors[f"{host}.parscale_prefix_{kind}"][stream].expand(2, -1, -1, -1) for kind in "kv")
            past.update(key, value, layer)
            num_past = key.shape[2]
        states = plain.get_decoder()(
            input_ids=random_tokens(),
            attention_mask=torch.ones(2, num_past + 9, dtype=torch.long),
            position_ids=torch.arange(9).expand(2, -1),
            past_key_values=past,
        )
        hidden_states.append(states.last_hidden_state)
    return plain.get_output_embeddings()(mix_by_hand(hidden_states, tensors, settings.aggregator_smoothing))


@each_together
@pytest.mark.parametrize("model_type", ["qwen2", "llama", "gpt2"])
def test_streams_equal_stock_models_with_edited_weights_and_their_prefix_as_past(model_type, names):
    model = trained(names, model_type)
    close(logits(model), logits_of_plain_models(model, model_type))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_model(model_type)))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_architecture_runs_prefixes_and_low_rank_weights_at_once(model_type):
    torch.manual_seed(1)
    backbone = tiny_model(model_type, "eager" if model_type == "gpt_oss" else "sdpa")
    model = stirred(get_peft_model(backbone, config(["prefix", "lora"])).eval(), 0.1)
    close(logits(model), logits_by_hand(model, model_type, input_ids=random_tokens()))


@each_together
def test_each_part_counts(names):
    """Without one of them the model says something else."""
    model = trained(names)
    expected = logits(model)
    for kind in named_transforms(names):
        parts = [f"parscale_{part}.default" for part in kind.parts()]
        own = [parameter for name, parameter in model.named_parameters() if any(part in name for part in parts)]
        before = [parameter.detach().clone() for parameter in own]
        with torch.no_grad():
            for parameter in own:
                parameter.zero_()
            assert (logits(model) - expected).abs().max() > 0.05
            for parameter, value in zip(own, before):
                parameter.copy_(value)
    assert torch.equal(logits(model), expected)


@each_together
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_file_holds_the_tensors_of_all_and_gives_the_same_logits_again(tmp_path, names, low_cpu_mem_usage):
    model = trained(names)
    model.save_pretrained(tmp_path)
    expected = IN_FILE["dynamic"].union(*(IN_FILE[name] for name in names))
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert set(found) == {f"base_model.model.model.{name}" for name in expected}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["stream_transform"] == names
    reloaded = PeftModel.from_pretrained(tiny_model(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(reloaded), logits(model))


def test_reparameterized_prefixes_are_folded_beside_low_rank_weights(tmp_path):
    model = trained(["prefix", "lora"], init_weights="reparameterized")
    assert any("parscale_prefix_k.default.hidden.weight" in name for name, _ in model.named_parameters())
    model.save_pretrained(tmp_path)
    close(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), logits(model))


def test_prefixes_from_tokens_start_as_they_do_alone():
    """Low-rank weights start at zero, and draw nothing before the tokens are drawn."""
    both, alone = (adapted(names, init_weights="tokens") for names in (["prefix", "lora"], "prefix"))
    tensors = file_tensors(both)
    prefixes = {name: tensor for name, tensor in file_tensors(alone).items() if "prefix" in name}
    assert len(prefixes) == 4
    assert all(torch.equal(tensors[name], tensor) for name, tensor in prefixes.items())


@each_together
def test_merging_gives_a_model_that_owns_its_streams(names):
    model = trained(names)
    expected = logits(model)
    merged = model.merge_and_unload()
    close(logits(merged), expected)
    assert {*merged.config.parscale["stream_transform"]} == {*names}
    assert merged.config.parscale["num_prefix_tokens"] == (4 if "prefix" in names else 0)


@each_together
@pytest.mark.parametrize("num_beams", [1, 3])
def test_cached_decoding_gives_the_tokens_of_uncached_decoding(names, num_beams):
    model = trained(names)
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": num_beams, "input_ids": random_tokens()}
    assert torch.equal(model.generate(**options), model.generate(**options, use_cache=False))


@each_together
def test_every_tensor_of_every_stream_gets_a_gradient_and_the_loss_falls(names):
    model = adapted(names)
    results = descend(model, 6)
    assert results[-1][0] < results[0][0] - 0.01
    gradients = results[-1][1]
    assert set(gradients) == {name for name, _ in model.named_parameters() if "parscale" in name}
    for name, gradient in gradients.items():
        streams = [gradient] if "aggregator" in name else gradient
        assert all(stream.isfinite().all() and stream.any() for stream in streams), name


@each_together
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_loss_and_no_gradient(names, use_reentrant):
    expected = descend(trained(names), 2)
    model = trained(names)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    for (loss, gradients), (expected_loss, expected_gradients) in zip(descend(model, 2), expected):
        assert loss == pytest.approx(expected_loss, abs=1e-5)
        for name, gradient in expected_gradients.items():
            torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-5, msg=name)


OTHERS = {
    "prefixes": {"names": "prefix", "num_streams": 2, "num_prefix_tokens": 5},
    "low rank": {"names": "lora", "num_streams": 4},
    "all": {"names": ["bitfit", "lora", "prefix"], "num_streams": 2, "num_prefix_tokens": 2, "aggregator": "mean"},
}


def resident():
    """One backbone with an adapter of two transforms beside one of each, and one of all."""
    model = adapted(["prefix", "lora"])
    for name, fields in OTHERS.items():
        model.add_adapter(name, config(**fields))
    for name in ("default", *OTHERS):
        model.set_adapter(name)
        stirred(model)
    return model


def test_switching_gives_each_adapter_its_own_streams():
    model = resident()
    names = ("default", *OTHERS)
    found = {}
    for name in names:
        model.set_adapter(name)
        found[name] = logits(model)
        close(found[name], logits_by_hand(model, input_ids=random_tokens()))
    for name in names[::-1]:
        model.set_adapter(name)
        assert torch.equal(logits(model), found[name])
    for name in names[1:]:
        model.delete_adapter(name)
    assert torch.equal(logits(model), found["default"])
    assert not any("parscale_bias" in name for name, _ in model.named_parameters())


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_every_sample_of_a_mixed_batch_gives_what_it_gives_alone(implementation):
    model = resident()
    model.set_attn_implementation(implementation)
    names = ["default", "__base__", "all", "prefixes", "low rank", "default"]
    input_ids = random_tokens(len(names))
    result = model(input_ids=input_ids, adapter_names=names).logits
    for sample, name in enumerate(names):
        alone = input_ids[sample : sample + 1]
        if name == "__base__":
            expected = logits(tiny_model(), input_ids=alone)
        else:
            model.set_adapter(name)
            expected = logits(model, input_ids=alone)
        torch.testing.assert_close(result[sample : sample + 1], expected, atol=1e-4, rtol=1e-4)
    generated = model.generate(input_ids=input_ids, adapter_names=names, max_new_tokens=4, do_sample=False)
    model.set_adapter("default")
    alone = model.generate(input_ids=input_ids[[0, 5]], max_new_tokens=4, do_sample=False)
    assert torch.equal(generated[[0, 5]], alone)


@each_together
def test_grown_streams_compute_the_same(names):
    model = trained(names)
    expected = logits(model)
    grow_streams(model, "default", "large", 6, perturbation=0.0)
    model.set_adapter("large")
    close(logits(model), expected)
    assert model.peft_config["large"].stream_transform == names


def test_streams_are_diagnosed():
    model = trained(["prefix", "lora"])
    batch = {"input_ids": random_tokens(), "labels": random_tokens()}
    found = diagnose(model, [batch])
    log_probs = logits_by_hand(model, input_ids=random_tokens())[:, :-1].log_softmax(-1)
    loss = torch.nn.functional.nll_loss(log_probs.reshape(-1, VOCABULARY), random_tokens()[:, 1:].reshape(-1))
    assert found.mixture_loss == pytest.approx(loss.item(), abs=1e-4)
    assert [layer.layer for layer in found.layers] == ["layers.0", "layers.1", "final"]
    assert len({round(loss, 4) for loss in found.own_loss}) == 3


@pytest.mark.parametrize("model_type", ["bloom", "falcon", "mamba"])
def test_prefixes_are_refused_in_company_too_where_no_attention_can_be_reached(model_type):
    backbone = tiny_model(model_type, "eager").requires_grad_(False)
    plain = logits(backbone)
    with pytest.raises(ValueError, match=r"no attention that streams can reach: .* use `stream_transform='lora'`"):
        get_peft_model(backbone, config(["prefix", "lora"]))
    assert torch.equal(logits(backbone), plain)
    model = stirred(get_peft_model(backbone, config(["lora", "bitfit"])).eval())
    close(logits(model), logits_by_hand(model, model_type, implementation="eager", input_ids=random_tokens()))


@pytest.mark.parametrize("name", STREAM_TRANSFORMS)
def test_a_list_of_one_is_the_name_itself(name):
    assert ParScaleConfig(stream_transform=[name]) == ParScaleConfig(stream_transform=name)
    assert ParScaleConfig(stream_transform=[name]).to_dict()["stream_transform"] == name


def test_equal_sets_are_equal_configurations():
    assert config(("lora", "prefix")) == config(["prefix", "lora"])
    assert config(["bitfit", "lora", "prefix"]).to_dict()["stream_transform"] == ["prefix", "lora", "bitfit"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ([], r"\[\]"),
        (["prefix", "prefix"], r"\['prefix', 'prefix'\]"),
        (["prefix", "suffix"], r"\['prefix', 'suffix'\]"),
        (["prefix", ["lora"]], r"\['prefix', \['lora'\]\]"),
        ("prefix,lora", "'prefix,lora'"),
        ({"prefix": True}, r"\{'prefix': True\}"),
    ],
)
def test_other_lists_are_refused(value, shown):
    with pytest.raises(
        ValueError,
        match=f"^`stream_transform` must be one of prefix, lora, bitfit, or a list .* each once, got {shown}",
    ):
        ParScaleConfig(stream_transform=value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"stream_transform": ["lora", "bitfit"], "num_prefix_tokens": 3},
            "`num_prefix_tokens` belongs to .*'prefix'`",
        ),
        ({"stream_transform": ["lora", "bitfit"], "init_weights": "tokens"}, "`init_weights` belongs to .*'prefix'`"),
        ({"stream_transform": ["prefix", "bitfit"], "stream_lora_rank": 4}, "`stream_lora_rank` belongs to .*'lora'`"),
    ],
)
def test_fields_of_a_transform_that_is_not_named_are_refused(fields, message):
    with pytest.raises(ValueError, match=rf"{message}, got .* with `stream_transform=\['"):
        ParScaleConfig(**fields)
    ParScaleConfig(**{**fields, "stream_transform": [*STREAM_TRANSFORMS]})
