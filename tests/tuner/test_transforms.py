import itertools
import json
import math

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from support.descent import descend, stirred
from support.names_in_files import IN_FILE
from support.oracle import logits_by_hand
from support.outputs import close, logits
from support.tiny_models import ARCHITECTURES, random_tokens, tiny_config, tiny_model, with_streams
from torch import nn
from transformers import AutoModelForSeq2SeqLM

from parscale_adapt import ParScaleConfig
from parscale_adapt.analysis.stream_states import find_layers
from parscale_adapt.core.aggregator import AGGREGATORS
from parscale_adapt.core.transforms import StreamBias, StreamLora
from parscale_adapt.hf.projections import observe_projections
from parscale_adapt.tuner.config import STREAM_TRANSFORMS
from parscale_adapt.tuner.shared_lora import backbone_modules


pytestmark = pytest.mark.slow


ON_LINEARS = ("lora", "bitfit")
UNREACHABLE = ("bloom", "falcon", "mamba")
COMBINATIONS = list(itertools.product(STREAM_TRANSFORMS, AGGREGATORS))


def config(num_streams=2, **fields):
    return ParScaleConfig(task_type="CAUSAL_LM", num_streams=num_streams, init_std=0.5, **fields)


def streams_on(backbone, num_streams=3, **fields):
    torch.manual_seed(1)
    return get_peft_model(backbone, config(num_streams, **fields)).eval()


def test_low_rank_weights_are_those_of_every_stream():
    module = StreamLora(num_streams=3, in_features=5, out_features=4, rank=2, alpha=6)
    module.reset_parameters(0.02)
    assert not module.lora_B.any()
    assert len({tuple(matrix.flatten().tolist()) for matrix in module.lora_A}) == 3
    nn.init.normal_(module.lora_B)
    states = torch.randn(3 * 2, 7, 5)
    for stream, rows in enumerate(states.view(3, 2, 7, 5)):
        weight = module.lora_B[stream] @ module.lora_A[stream] * 3
        torch.testing.assert_close(module(states).view(3, 2, 7, 4)[stream], rows @ weight.T)


def test_low_rank_weights_start_as_in_peft():
    module = StreamLora(num_streams=2, in_features=400, out_features=4, rank=50, alpha=1)
    module.reset_parameters(0.02)
    bound = 400**-0.5  # kaiming_uniform_ with a=sqrt(5): uniform in +-1/sqrt(in_features)
    assert module.lora_A.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert module.lora_A.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


def test_biases_are_those_of_every_stream():
    module = StreamBias(num_streams=3, out_features=4)
    module.reset_parameters(0.5)
    rows = (torch.zeros(3 * 2, 7, 4) + module(torch.randn(3 * 2, 7, 5))).view(3, 2, 7, 4)
    for stream in range(3):
        assert torch.equal(rows[stream], module.bias[stream].expand(2, 7, 4))
    assert len({tuple(bias.tolist()) for bias in module.bias}) == 3


@pytest.mark.parametrize("transform", ON_LINEARS)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_streams_equal_one_forward_per_stream_with_edited_weights(model_type, transform):
    backbone = tiny_model(model_type, "eager")
    plain = logits(backbone)
    model = stirred(streams_on(backbone, stream_transform=transform))
    close(logits(model), logits_by_hand(model, model_type, input_ids=random_tokens()))
    assert (logits(model) - plain).abs().max() > 0.1
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("transform", ON_LINEARS)
@pytest.mark.parametrize("model_type", UNREACHABLE)
def test_backbones_without_reachable_attention_run_in_streams(model_type, transform):
    backbone = tiny_model(model_type, "eager").requires_grad_(False)  # torch's convolution rounds otherwise if trained
    plain = logits(backbone)
    model = stirred(streams_on(backbone, stream_transform=transform))
    expected = logits_by_hand(model, model_type, implementation="eager", input_ids=random_tokens())
    close(logits(model), expected)
    assert (logits(model) - plain).abs().max() > 0.05
    assert torch.equal(logits(model.unload()), plain)


@pytest.mark.parametrize("model_type", UNREACHABLE)
def test_prefixes_are_refused_where_no_attention_can_be_reached(model_type):
    backbone = tiny_model(model_type, "eager")
    plain = logits(backbone)
    with pytest.raises(ValueError, match=r"no attention that streams can reach: .* use `stream_transform='lora'`"):
        get_peft_model(backbone, config())
    assert torch.equal(logits(backbone), plain)
    assert not hasattr(backbone.base_model, "parscale")


@pytest.mark.parametrize("transform", ON_LINEARS)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny_model().model, "Qwen2Model is not a causal LM with an LM head"),
        (lambda: AutoModelForSeq2SeqLM.from_config(tiny_config("bart")), "is an encoder-decoder model"),
    ],
)
def test_models_without_decoder_or_lm_head_stay_refused(make, message, transform):
    with pytest.raises(ValueError, match=message):
        get_peft_model(make(), config(stream_transform=transform))


@pytest.mark.parametrize("transform", ON_LINEARS)
@pytest.mark.parametrize("model_type", ["qwen2", "mistral", "gpt2", "bloom", "falcon"])
def test_padding_and_order_of_samples_change_nothing(model_type, transform):
    model = stirred(streams_on(tiny_model(model_type, "eager"), stream_transform=transform))
    input_ids, mask = random_tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    input_ids[1, :4] = mask[1, :4] = 0
    found = logits(model, input_ids=input_ids, attention_mask=mask)
    for sample in range(3):
        visible = mask[sample].bool()
        alone = logits(model, input_ids=input_ids[sample, visible].unsqueeze(0))
        positions = {"qwen2", "mistral", "bloom", "falcon"}  # relative; gpt2 counts padded positions too
        if model_type in positions or visible.all():
            close(found[sample, visible], alone[0])


@pytest.mark.parametrize("transform", ON_LINEARS)
def test_packed_documents_do_not_see_each_other(transform):
    model = stirred(streams_on(tiny_model(), stream_transform=transform))
    documents = [random_tokens(1, length, seed=length) for length in (7, 1, 4)]
    positions = torch.cat([torch.arange(document.shape[1]) for document in documents]).unsqueeze(0)
    packed = logits(model, input_ids=torch.cat(documents, 1), position_ids=positions, use_cache=False)
    close(packed, torch.cat([logits_by_hand(model, input_ids=document) for document in documents], 1))


@pytest.mark.parametrize("transform", ON_LINEARS)
def test_masks_leave_no_room_for_a_prefix(transform):
    """flex_attention builds its masks before any layer runs; a prefix adapter on the same backbone has another n."""
    model = streams_on(tiny_model(), stream_transform=transform)
    model.add_adapter("prefixes", config(2, num_prefix_tokens=3))
    model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):
        for name in ("default", "prefixes", "default"):
            model.set_adapter(name)
            stirred(model)
            close(logits(model), logits_by_hand(model, input_ids=random_tokens()))


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize(("transform", "aggregator"), COMBINATIONS)
def test_cached_decoding_gives_the_tokens_of_uncached_decoding(transform, aggregator, num_beams):
    model = stirred(streams_on(tiny_model(), stream_transform=transform, aggregator=aggregator))
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": num_beams, "input_ids": random_tokens()}
    cached, uncached = model.generate(**options), model.generate(**options, use_cache=False)
    assert torch.equal(cached, uncached)
    by_hand = options["input_ids"]
    for _ in range(8 if num_beams == 1 else 0):
        by_hand = torch.cat([by_hand, logits_by_hand(model, input_ids=by_hand)[:, -1:].argmax(-1)], 1)
    assert num_beams > 1 or torch.equal(cached, by_hand[:, : cached.shape[1]])


@pytest.mark.parametrize("transform", ON_LINEARS)
@pytest.mark.parametrize("model_type", ["gpt2", "qwen3_moe", "deepseek_v3", *UNREACHABLE])
def test_cached_decoding_works_on_other_backbones(model_type, transform):
    model = stirred(streams_on(tiny_model(model_type, "eager"), stream_transform=transform))
    options = {"max_new_tokens": 8, "do_sample": False, "input_ids": random_tokens()}
    assert torch.equal(model.generate(**options), model.generate(**options, use_cache=False))


@pytest.mark.parametrize("train_backbone", [False, True])
@pytest.mark.parametrize(("transform", "aggregator"), COMBINATIONS)
def test_every_combination_trains(transform, aggregator, train_backbone):
    model = streams_on(tiny_model(), stream_transform=transform, aggregator=aggregator, train_backbone=train_backbone)
    names = {name for name, _ in model.named_parameters()}
    results = descend(model, 6)
    losses, gradients = [loss for loss, _ in results], results[-1][1]
    assert losses[-1] < losses[0] - 0.01
    assert set(gradients) == {name for name in names if train_backbone or "parscale" in name}
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
        streams = [gradient] if "parscale" not in name or "aggregator" in name else gradient
        assert all(stream.any() for stream in streams), name


@pytest.mark.parametrize("transform", ON_LINEARS)
def test_streams_drift_apart_from_the_first_step_on(transform):
    model = streams_on(tiny_model(), stream_transform=transform)
    descend(model, 2)
    own = {"lora": "parscale_lora.", "bitfit": "parscale_bias."}[transform]
    moved = {name: parameter for name, parameter in model.named_parameters() if own in name}
    assert len(moved) == 2 * 7 * (2 if transform == "lora" else 1)
    for name, parameter in moved.items():
        assert len({tuple(stream.flatten().tolist()) for stream in parameter}) == 3, name


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("model_type", ["qwen2", "gpt2"])
@pytest.mark.parametrize(("transform", "aggregator"), [("lora", "static"), ("bitfit", "mean"), ("prefix", "static")])
def test_gradient_checkpointing_changes_no_loss_and_no_gradient(transform, aggregator, model_type, use_reentrant):
    fields = {"stream_transform": transform, "aggregator": aggregator}
    expected = descend(stirred(streams_on(tiny_model(model_type), **fields)), 2)
    model = stirred(streams_on(tiny_model(model_type), **fields))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    for (loss, gradients), (expected_loss, expected_gradients) in zip(descend(model, 2), expected):
        assert loss == pytest.approx(expected_loss, abs=1e-5)
        for name, gradient in expected_gradients.items():
            torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(("transform", "aggregator"), COMBINATIONS)
def test_every_combination_is_saved_under_its_names_and_gives_the_same_logits_again(
    tmp_path, transform, aggregator, low_cpu_mem_usage
):
    model = stirred(streams_on(tiny_model(), stream_transform=transform, aggregator=aggregator))
    model.save_pretrained(tmp_path)
    names = {f"base_model.model.model.{name}" for name in IN_FILE[transform] | IN_FILE[aggregator]}
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == names
    reloaded = PeftModel.from_pretrained(tiny_model(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert reloaded.peft_config["default"].stream_transform == transform
    assert torch.equal(logits(reloaded), logits(model))


@pytest.mark.parametrize("transform", ON_LINEARS)
@pytest.mark.parametrize("model_type", ["gpt2", "qwen3_moe", *UNREACHABLE])
def test_other_backbones_are_saved_and_loaded_too(tmp_path, model_type, transform):
    model = stirred(streams_on(tiny_model(model_type, "eager"), stream_transform=transform))
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(tiny_model(model_type, "eager"), tmp_path)
    assert torch.equal(logits(reloaded), logits(model))


@pytest.mark.parametrize("transform", STREAM_TRANSFORMS)
def test_a_trained_backbone_is_saved_with_every_transform(tmp_path, transform):
    model = stirred(streams_on(tiny_model(), stream_transform=transform, train_backbone=True), 0.05)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), logits(model))


@pytest.mark.parametrize("transform", ON_LINEARS)
def test_half_precision_backbones_run_with_float32_transforms(transform):
    reference = stirred(streams_on(tiny_model(), stream_transform=transform), 0.1)
    model = stirred(streams_on(tiny_model().bfloat16(), stream_transform=transform), 0.1)
    assert {p.dtype for name, p in model.named_parameters() if "parscale" in name} == {torch.float32}
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = logits(model)
        assert found.dtype == torch.bfloat16
        assert torch.cosine_similarity(found.float().flatten(), logits(reference).flatten(), 0) > 0.99


class Experts(nn.Module):
    """Linear layers that see chosen tokens, one that is read instead of called, and one that is called as usual."""

    def __init__(self, in_training_only):
        super().__init__()
        self.router, self.first, self.second, self.read = (nn.Linear(32, size) for size in (2, 32, 32, 32))
        self.in_training_only = in_training_only

    def forward(self, states):
        chosen = self.router(states).argmax(-1).bool()
        result = torch.zeros_like(states)
        result[chosen], result[~chosen] = self.first(states[chosen]), self.second(states[~chosen])
        if self.training or not self.in_training_only:
            return result + states @ self.read.weight
        return result + self.read(states)


@pytest.mark.parametrize("in_training_only", [False, True])
def test_linear_layers_that_cannot_tell_streams_apart_are_left_out(in_training_only):
    backbone = tiny_model(num_hidden_layers=1)
    backbone.model.layers[0].mlp = Experts(in_training_only)
    backbone.lm_head.train()
    backbone.model.layers[0].self_attn.eval()
    modes = [module.training for module in backbone.modules()]
    shapes = observe_projections(backbone, backbone_modules(backbone))
    prefix = "model.layers.0"
    assert shapes == {
        f"{prefix}.self_attn.q_proj": (32, 32),
        f"{prefix}.self_attn.k_proj": (32, 16),
        f"{prefix}.self_attn.v_proj": (32, 16),
        f"{prefix}.self_attn.o_proj": (32, 32),
        f"{prefix}.mlp.router": (32, 2),
    }
    assert [module.training for module in backbone.modules()] == modes


def test_a_backbone_without_any_linear_layer_to_use_is_refused():
    backbone = tiny_model()
    with pytest.raises(ValueError, match="Qwen2ForCausalLM has no linear layer through which streams run as rows"):
        observe_projections(backbone, {"lm_head": backbone.lm_head})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"stream_transform": "lora", "init_weights": "tokens"},
            "`init_weights` belongs to `stream_transform='prefix'`",
        ),
        (
            {"stream_transform": "bitfit", "init_weights": "reparameterized"},
            "`init_weights` belongs to .* got 'reparameterized' with `stream_transform='bitfit'`: leave it at 'normal'",
        ),
        ({"stream_transform": "lora", "num_prefix_tokens": 3}, "`num_prefix_tokens` belongs to .* got 3 with"),
        ({"stream_lora_rank": 4}, "`stream_lora_rank` belongs to `stream_transform='lora'`, got 4 with"),
        (
            {"stream_transform": "bitfit", "stream_lora_alpha": 4.0},
            "`stream_lora_alpha` belongs to .*'lora'`, got 4.0",
        ),
    ],
)
def test_fields_of_another_transform_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ParScaleConfig(**fields)


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        (
            "stream_transform",
            "suffix",
            "must be one of prefix, lora, bitfit, or a list of several, each once, got 'suffix'",
        ),
        ("stream_transform", None, "must be one of prefix, lora, bitfit, or a list of several, each once, got None"),
        ("aggregator", "median", "must be one of dynamic, static, mean, got 'median'"),
        ("stream_lora_rank", 0, "must be an integer of at least 1, got 0"),
        ("stream_lora_rank", 2.0, r"must be an integer of at least 1, got 2\.0"),
        ("stream_lora_alpha", 0, "must be positive, got 0"),
        ("stream_lora_alpha", math.nan, "must be positive, got nan"),
    ],
)
def test_a_bad_value_is_refused_with_its_field_rule_and_value(field, value, rule):
    fields = {"stream_transform": "lora", field: value}
    with pytest.raises(ValueError, match=f"^`{field}` {rule}"):
        ParScaleConfig(**fields)


@pytest.mark.parametrize("transform", ON_LINEARS)
def test_copies_of_linear_layers_in_streams_are_refused(transform):
    backbone = tiny_model()
    plain = logits(backbone)
    with pytest.raises(
        ValueError, match=r"`modules_to_save` names 'mlp', but PEFT would train a copy of `model\.layers\.0\.mlp"
    ):
        get_peft_model(backbone, config(stream_transform=transform, modules_to_save=["mlp"]))
    assert torch.equal(logits(backbone), plain)
    model = stirred(get_peft_model(backbone, config(stream_transform=transform, modules_to_save=["lm_head"])))
    assert logits(model).isfinite().all()


def test_rank_and_scale_are_those_of_the_configuration():
    model = streams_on(tiny_model(), stream_transform="lora", stream_lora_rank=3, stream_lora_alpha=12.0)
    module = model.get_base_model().model.layers[0].mlp.up_proj.parscale.parscale_lora["default"]
    assert tuple(module.lora_A.shape) == (3, 3, 32)
    assert tuple(module.lora_B.shape) == (3, 48, 3)
    assert module.scaling == 4


@pytest.mark.parametrize("model_type", ["qwen2", "bloom"])
@pytest.mark.parametrize("transform", ON_LINEARS)
def test_streams_can_be_diagnosed_layer_by_layer(model_type, transform):
    model = stirred(streams_on(tiny_model(model_type, "eager"), stream_transform=transform))
    decoder = model.get_base_model().get_decoder()
    name = "h" if model_type == "bloom" else "layers"
    assert list(find_layers(decoder)) == [f"{name}.0", f"{name}.1"]


@pytest.mark.parametrize("aggregator", ["static", "mean"])
def test_the_reports_of_peft_work(aggregator):
    model = streams_on(tiny_model(), stream_transform="bitfit", aggregator=aggregator)
    status = model.get_model_status()
    assert (status.enabled, status.active_adapters, status.requires_grad) == (True, ["default"], {"default": True})
    num_biases = 2 * (32 + 16 + 16 + 32 + 48 + 48 + 32)
    assert model.get_nb_trainable_parameters()[0] == 3 * num_biases + (3 if aggregator == "static" else 0)


def test_a_file_from_before_the_new_fields_loads_as_a_prefix_adapter(tmp_path):
    model = with_streams(tiny_model())
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    fields = json.loads(path.read_text())
    for name in ("stream_transform", "stream_lora_rank", "stream_lora_alpha", "aggregator", "lora"):
        del fields[name]
    path.write_text(json.dumps(fields))
    reloaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(logits(reloaded), logits(model))
