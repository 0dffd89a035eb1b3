import json

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from support.descent import descend, stirred
from support.oracle import logits_by_hand
from support.outputs import close, logits
from support.tiny_models import ARCHITECTURES, random_tokens, tiny_model, with_streams
from support.traces import traces

from parscale_adapt import ParScaleConfig
from parscale_adapt.tuner.shared_lora import SUPPORTED_FIELDS


TARGETS = {  # a linear layer in attention and, where there is one, in the MLP
    "gpt2": ["c_attn", "c_fc"],
    "phi3": ["qkv_proj", "down_proj"],
    "opt": ["q_proj", "fc1"],
    "deepseek_v3": ["q_a_proj", "o_proj"],
}


def lora_fields(model_type="qwen2", **fields):
    targets = TARGETS.get(model_type, ["q_proj", "o_proj"])
    return {"r": 4, "lora_alpha": 8, "target_modules": targets, "fan_in_fan_out": model_type == "gpt2", **fields}


def config(num_streams, **fields):
    if fields.get("stream_transform", "prefix") == "prefix":
        fields = {"num_prefix_tokens": 3, **fields}
    return ParScaleConfig(task_type="CAUSAL_LM", num_streams=num_streams, init_std=0.5, **fields)


def joint(num_streams=2, model_type="qwen2", implementation="sdpa", **fields):
    torch.manual_seed(1)
    fields = {"lora": lora_fields(model_type), **fields}
    return get_peft_model(tiny_model(model_type, implementation), config(num_streams, **fields)).eval()


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {".*": 2}}, {"lora_dropout": 0.5}])
@pytest.mark.parametrize("model_type", ["qwen2", "gpt2", "phi3"])
def test_with_one_stream_it_is_the_lora_of_peft(tmp_path, model_type, options):
    fields = lora_fields(model_type, **options)
    plain = stirred(get_peft_model(tiny_model(model_type), LoraConfig(task_type="CAUSAL_LM", **fields)))
    plain.save_pretrained(tmp_path / "plain")
    model = joint(1, model_type, lora=fields)
    model.save_pretrained(tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "plain"))
    assert {name: value.shape for name, value in ours.items()} == {n: value.shape for n, value in theirs.items()}
    (tmp_path / "ours" / "adapter_model.safetensors").unlink()
    (tmp_path / "plain" / "adapter_model.safetensors").rename(tmp_path / "ours" / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(tiny_model(model_type), tmp_path / "ours")
    assert torch.equal(logits(loaded), logits(plain))
    assert not torch.equal(logits(loaded), logits(tiny_model(model_type)))


def test_one_stream_trains_as_the_lora_of_peft():
    plain = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", **lora_fields()))
    model = joint(1)
    tensors = {name: value for name, value in plain.state_dict().items() if "lora" in name}
    assert not model.load_state_dict(tensors, strict=False).unexpected_keys
    for each in (plain, model):
        each.train()(input_ids=random_tokens(), labels=random_tokens()).loss.backward()
    gradients = [{n: p.grad for n, p in each.named_parameters() if p.requires_grad} for each in (plain, model)]
    assert gradients[0].keys() == gradients[1].keys() == tensors.keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_prefixes_and_lora_equal_one_forward_per_stream_with_merged_weights(model_type):
    model = stirred(joint(3, model_type, "eager"))
    close(logits(model), logits_by_hand(model, model_type, input_ids=random_tokens()))
    shared = [parameter for name, parameter in model.named_parameters() if ".lora_B." in name]
    before = logits(model)
    with torch.no_grad():
        shared[0].zero_()
    assert (logits(model) - before).abs().max() > 1e-3


@pytest.mark.parametrize("aggregator", ["dynamic", "static", "mean"])
@pytest.mark.parametrize("transform", ["lora", "bitfit"])
@pytest.mark.parametrize("model_type", ["qwen2", "gpt2", "bloom"])
def test_lora_and_transforms_on_the_same_linear_layers_add_up(model_type, transform, aggregator):
    fields = {"target_modules": ["query_key_value", "dense"]} if model_type == "bloom" else {}
    lora = lora_fields(model_type, **fields)
    model = stirred(joint(2, model_type, "eager", lora=lora, stream_transform=transform, aggregator=aggregator))
    implementation = "eager" if model_type == "bloom" else "oracle"
    close(logits(model), logits_by_hand(model, model_type, implementation=implementation, input_ids=random_tokens()))


def test_lora_on_an_unreachable_backbone_needs_no_transform():
    model = stirred(joint(1, "mamba", "eager", lora={"r": 4, "lora_alpha": 8, "target_modules": ["in_proj"]}))
    expected = logits_by_hand(model, "mamba", implementation="eager", input_ids=random_tokens())
    close(logits(model), expected)
    assert (expected - logits(tiny_model("mamba", "eager"))).abs().max() > 1e-2


@pytest.mark.parametrize("num_streams", [1, 2])
def test_cached_decoding_gives_the_tokens_of_uncached_decoding(num_streams):
    model = stirred(joint(num_streams))
    options = {"max_new_tokens": 8, "do_sample": False, "input_ids": random_tokens()}
    by_hand = options["input_ids"]
    for _ in range(8):
        by_hand = torch.cat([by_hand, logits_by_hand(model, input_ids=by_hand)[:, -1:].argmax(-1)], 1)
    for use_cache in (False, True):
        found = model.generate(**options, use_cache=use_cache)
        assert torch.equal(found, by_hand[:, : found.shape[1]])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"init_weights": "reparameterized"},
        {"init_weights": "tokens"},
        {"stream_transform": "lora"},
        {"stream_transform": "bitfit", "aggregator": "static"},
    ],
)
def test_lora_and_streams_are_trained_together(fields):
    model = joint(2, **fields)
    losses = [loss for loss, _ in descend(model, 6)]
    assert losses[-1] < losses[0] - 0.01
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if "parscale" in n or ".lora_" in n}
    assert sum("parscale" not in name for name in trained) == 2 * 2 * 2
    for name, parameter in model.named_parameters():
        if name in trained:
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


@pytest.mark.parametrize("fields", [{}, {"stream_transform": "lora"}])
def test_gradient_checkpointing_changes_nothing(fields):
    plain, model = stirred(joint(2, **fields)), stirred(joint(2, **fields))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    expected = [loss for loss, _ in descend(plain, 6)]
    assert [loss for loss, _ in descend(model, 6)] == pytest.approx(expected, abs=1e-5)
    for (name, found), expected in zip(model.named_parameters(), plain.parameters()):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(
    "fields",
    [{}, {"stream_transform": "lora", "aggregator": "mean"}, {"modules_to_save": ["lm_head"]}],
)
def test_they_are_saved_in_one_file_under_the_names_of_peft(tmp_path, fields, low_cpu_mem_usage):
    model = stirred(joint(2, **fields))
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    attention = "base_model.model.model.layers.1.self_attn"
    assert {f"{attention}.{name}.lora_{kind}.weight" for name in ("q_proj", "o_proj") for kind in "AB"} <= names
    assert not any("base_layer" in name or "default" in name for name in names)
    reloaded = PeftModel.from_pretrained(tiny_model(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    close(logits(reloaded), logits(model))
    assert not any(p.requires_grad for name, p in reloaded.named_parameters() if ".lora_" in name)
    again = PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True)
    descend(again, 2)
    again.save_pretrained(tmp_path / "again")
    assert set(load_file(tmp_path / "again" / "adapter_model.safetensors")) == names


@pytest.mark.parametrize("num_streams", [1, 2])
def test_low_rank_weights_of_experts_are_those_of_peft(tmp_path, num_streams):
    everything = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
    plain = stirred(get_peft_model(tiny_model("qwen3_moe"), LoraConfig(task_type="CAUSAL_LM", **everything)))
    model = joint(num_streams, "qwen3_moe", lora=everything)
    tensors = {name: value for name, value in plain.state_dict().items() if ".lora_" in name}
    assert any("experts.base_layer.lora_A" in name for name in tensors)
    assert not model.load_state_dict(tensors, strict=False).unexpected_keys
    expected = plain.merge_and_unload()
    if num_streams > 1:
        expected = get_peft_model(expected, config(num_streams)).eval()
        expected.load_state_dict({n: t for n, t in model.state_dict().items() if "parscale" in n}, strict=False)
    close(logits(model), logits(expected))
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(tiny_model("qwen3_moe"), tmp_path)
    close(logits(reloaded), logits(model))
    names = [name for name, _ in tiny_model("qwen3_moe").named_modules()]
    reloaded.delete_adapter("default")
    assert [n for n, _ in reloaded.base_model.model.named_modules() if "parscale" not in n] == names
    assert [name for name, _ in model.unload().named_modules()] == names


def test_adapters_with_low_rank_weights_on_different_experts_are_refused():
    model = joint(1, "qwen3_moe", lora={"r": 2, "target_modules": "all-linear"})
    expected = logits(model)
    with pytest.raises(ValueError, match="all adapters must target the same set of parameters"):
        model.add_adapter("other", config(2, lora={"r": 2, "target_parameters": ["experts.down_proj"]}))
    assert torch.equal(logits(model), expected)


def test_low_rank_weights_of_embeddings_are_saved_too(tmp_path):
    model = stirred(joint(2, lora={"r": 2, "target_modules": ["embed_tokens", "q_proj"]}))
    model.save_pretrained(tmp_path)
    names = {name.rpartition("model.")[2] for name in load_file(tmp_path / "adapter_model.safetensors")}
    assert {"embed_tokens.lora_embedding_A", "embed_tokens.lora_embedding_B"} <= names
    reloaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(logits(reloaded), logits(model))


LORA_TENSOR = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(LORA_TENSOR), r"missing: \S+q_proj\.lora_B"),
        (lambda tensors: tensors.update({LORA_TENSOR: torch.zeros(32, 3)}), r"wrong shape: \S+lora_B\S+ \(32, 3\)"),
        (lambda tensors: tensors.update({"x.lora_A.weight": torch.zeros(1)}), r"unexpected: x\.lora_A"),
    ],
)
@pytest.mark.parametrize("num_streams", [1, 2])
def test_an_incomplete_file_is_refused(tmp_path, change, message, num_streams):
    joint(num_streams).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"The adapter file does not hold the tensors .*{message}"):
        PeftModel.from_pretrained(tiny_model(), tmp_path)


def test_a_shard_of_low_rank_weights_is_not_saved():
    model = joint(2)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    with pytest.raises(ValueError, match=rf"of wrong shape: {name} \(0,\)"):
        get_peft_model_state_dict(model, model.state_dict() | {name: torch.empty(0)})


@pytest.mark.parametrize("as_dictionary", [False, True])
def test_the_configuration_survives_its_file(tmp_path, as_dictionary):
    fields = {"r": 3, "lora_alpha": 5, "target_modules": ["v_proj", "q_proj"], "rank_pattern": {"q_proj": 2}}
    given = dict(fields) if as_dictionary else LoraConfig(**fields)
    saved = config(2, lora=given)
    assert isinstance(saved.lora, LoraConfig)
    saved.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())["lora"]
    assert stored.items() >= {**fields, "target_modules": ["q_proj", "v_proj"]}.items()
    assert set(stored) == set(SUPPORTED_FIELDS)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert loaded.lora == saved.lora
    assert loaded.to_dict() == saved.to_dict()
    assert config(2).to_dict()["lora"] is None


def test_targets_that_peft_chooses_are_saved(tmp_path):
    model = joint(2, lora={"r": 2})
    model.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).lora.target_modules == {"q_proj", "v_proj"}


def test_the_users_own_configuration_stays_as_it_was():
    lora = LoraConfig(r=2, target_modules="all-linear")
    before = lora.to_dict()
    get_peft_model(tiny_model(), config(2, lora=lora))
    assert lora.to_dict() == before


@pytest.mark.parametrize(
    ("lora", "error", "message"),
    [
        ({"rank": 4}, ValueError, r"`lora` has unknown fields \['rank'\]: it can hold r, lora_alpha"),
        ({"use_dora": True}, ValueError, "`lora` sets `use_dora` to True, which doesn't go with streams"),
        (LoraConfig(bias="all"), ValueError, "`lora` sets `bias` to 'all'"),
        (LoraConfig(modules_to_save=["lm_head"]), ValueError, "`lora` sets `modules_to_save`"),
        ({"init_lora_weights": "pissa"}, ValueError, "`init_lora_weights` in `lora` must be one of .* got 'pissa'"),
        (8, TypeError, r"`lora` must be a peft\.LoraConfig or a dictionary, got int"),
        (ParScaleConfig(), TypeError, r"`lora` must be a peft\.LoraConfig or a dictionary, got ParScaleConfig"),
    ],
)
def test_low_rank_weights_that_would_change_the_backbone_are_refused(lora, error, message):
    with pytest.raises(error, match=message):
        ParScaleConfig(lora=lora)


def test_low_rank_weights_on_a_backbone_that_is_trained_anyway_are_refused():
    with pytest.raises(
        ValueError, match="`lora` adds low-rank weights to a backbone that `train_backbone=True` trains"
    ):
        ParScaleConfig(lora={}, train_backbone=True)


@pytest.mark.parametrize("num_streams", [1, 2])
@pytest.mark.parametrize(
    ("targets", "message"),
    [(["no_such"], r"Target modules \{'no_such'\} not found"), (["q_proj", "mlp"], "is not supported")],
)
def test_targets_that_do_not_fit_change_nothing(targets, message, num_streams):
    backbone = tiny_model()
    before, plain = traces(backbone), logits(backbone)
    with pytest.raises(ValueError, match=message):
        get_peft_model(backbone, config(num_streams, lora={"target_modules": targets}))
    assert traces(backbone) == before
    model = with_streams(backbone)
    names, expected = [name for name, _ in model.named_modules()], logits(model)
    parameters = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        model.add_adapter("other", config(num_streams, lora={"target_modules": targets}))
    assert [name for name, _ in model.named_modules()] == names
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == parameters
    assert list(model.peft_config) == model.active_adapters == ["default"]
    assert torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("first", ["streams", "lora"])
def test_all_linear_means_those_of_the_backbone(first):
    everything = {"r": 2, "target_modules": "all-linear"}
    fields = {"stream_transform": "lora"}
    model = joint(2, **fields, lora=None) if first == "streams" else joint(1, lora=everything)
    model.add_adapter("other", config(1, lora=everything) if first == "streams" else config(2, **fields))
    wrapped = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    assert len(wrapped) == 2 * 7
    assert {name.rpartition(".")[2] for name in wrapped} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    for name in ("default", "other"):
        model.set_adapter(name)
        stirred(model)
        close(logits(model), logits_by_hand(model, input_ids=random_tokens()))


@pytest.mark.parametrize("num_streams", [1, 4])
def test_unloading_leaves_no_trace(num_streams):
    backbone = tiny_model()
    before, expected = traces(backbone), logits(backbone)
    model = get_peft_model(backbone, config(num_streams, lora={"target_modules": "all-linear"}))
    model.add_adapter("other", config(2, stream_transform="lora", lora=lora_fields()))
    logits(model)
    assert model.unload() is backbone
    assert traces(backbone) == before
    assert torch.equal(logits(backbone), expected)


def test_tokens_are_chosen_by_the_plain_backbone():
    """Another adapter's low-rank weights must not have a say in where new prefixes start."""
    backbone = tiny_model()
    torch.manual_seed(3)
    alone = get_peft_model(backbone, config(2, init_weights="tokens"), "new")
    model = stirred(joint(1))
    torch.manual_seed(3)
    model.add_adapter("new", config(2, init_weights="tokens"))
    expected = {name: tensor for name, tensor in alone.state_dict().items() if "prefix" in name}
    assert len(expected) == 4
    for name, tensor in expected.items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_a_half_precision_backbone_gets_float32_weights():
    model = stirred(get_peft_model(tiny_model().bfloat16(), config(2, lora=lora_fields())), 0.05)
    assert {p.dtype for name, p in model.named_parameters() if ".lora_" in name} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16
    expected = stirred(joint(2), 0.05)
    assert torch.cosine_similarity(logits(model).float().flatten(), logits(expected).flatten(), 0) > 0.99


def test_adding_an_adapter_trains_nothing_that_was_frozen(tmp_path):
    stirred(joint(2)).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_model(), tmp_path)
    norm = model.get_base_model().model.norm.weight.requires_grad_(True)  # a choice of the user's
    model.add_adapter("other", config(1, lora=lora_fields()))
    assert [parameter for parameter in model.parameters() if parameter.requires_grad] == [norm]
    model.set_adapter("other")
    assert all(p.requires_grad == (".other." in n or p is norm) for n, p in model.named_parameters())
