import copy
import itertools

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from support.descent import descend, stirred
from support.oracle import logits_by_hand
from support.outputs import logits
from support.tiny_models import random_tokens, tiny_model

from parscale_adapt import ParScaleConfig, grow_streams
from parscale_adapt.core.aggregator import AGGREGATORS
from parscale_adapt.tuner.config import STREAM_TRANSFORMS


TOGETHER = ["prefix", "lora"]
COMBINATIONS = [
    *itertools.product(STREAM_TRANSFORMS, AGGREGATORS),
    (TOGETHER, "dynamic"),
    (["lora", "bitfit"], "mean"),
]


def trained(num_streams=2, backbone=None, **fields):
    """An adapter `small` after some training: every tensor that is trained has moved."""
    torch.manual_seed(1)
    if "prefix" in fields.get("stream_transform", "prefix"):
        fields = {"num_prefix_tokens": 3, **fields}
    config = ParScaleConfig(task_type="CAUSAL_LM", num_streams=num_streams, init_std=0.5, **fields)
    return stirred(get_peft_model(tiny_model() if backbone is None else backbone, config, "small"), 0.1)


def logits_of(model, adapter):
    model.set_adapter(adapter)
    return logits(model)


def file_tensors(model, adapter):
    tensors = get_peft_model_state_dict(model, adapter_name=adapter)
    return {name.removeprefix("base_model.model."): tensor.detach().clone() for name, tensor in tensors.items()}


def by_stream(tensors):
    """What the streams differ by."""
    return {name: value for name, value in tensors.items() if ".parscale_" in name and "aggregator" not in name}


@pytest.mark.parametrize("num_copies", [2, 3])
@pytest.mark.parametrize(("transform", "aggregator"), COMBINATIONS)
def test_without_perturbation_the_function_is_the_same(transform, aggregator, num_copies):
    model = trained(stream_transform=transform, aggregator=aggregator)
    expected = logits(model)
    grow_streams(model, "small", "large", 2 * num_copies, perturbation=0.0)
    assert model.active_adapters == ["small"]
    assert torch.equal(logits(model), expected)
    torch.testing.assert_close(logits_of(model, "large"), expected, atol=1e-5, rtol=1e-5)
    assert model.peft_config["large"].num_streams == model.peft_config["small"].num_streams * num_copies
    torch.testing.assert_close(logits_by_hand(model, input_ids=random_tokens()), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("transform", "aggregator"), COMBINATIONS)
def test_a_small_perturbation_sets_copies_apart_and_hardly_changes_the_function(transform, aggregator):
    model = trained(stream_transform=transform, aggregator=aggregator)
    expected, small = logits(model), by_stream(file_tensors(model, "small"))
    grow_streams(model, "small", "large", 6, perturbation=0.01)
    large = by_stream(file_tensors(model, "large"))
    assert large.keys() == small.keys() != set()
    for name, tensor in small.items():
        first, *copies = large[name].view(3, *tensor.shape)
        assert torch.equal(first, tensor)
        for each in copies:
            distance = (each - tensor).square().mean().sqrt() / tensor.square().mean().sqrt()
            assert distance.item() == pytest.approx(0.01, rel=0.4), name
        assert not torch.equal(*copies)
    change = (logits_of(model, "large") - expected).abs().max()
    assert 0 < change < 0.1 * (expected - logits(tiny_model())).abs().max()


@pytest.mark.parametrize("perturbation", [0.0, 0.01])
@pytest.mark.parametrize("transform", [*STREAM_TRANSFORMS, TOGETHER], ids=str)
def test_perturbed_copies_drift_apart_in_training_and_exact_ones_do_not(transform, perturbation):
    model = trained(stream_transform=transform)
    grow_streams(model, "small", "large", 4, perturbation)
    model.set_adapter("large")

    def gaps():
        return [tensor[2:] - tensor[:2] for tensor in by_stream(file_tensors(model, "large")).values()]

    before = gaps()
    results = descend(model, 8)
    assert results[-1][0] < results[0][0]
    drift = max((now - then).abs().max().item() for now, then in zip(gaps(), before))
    assert drift < 1e-6 if perturbation == 0 else drift > 1e-5


def test_only_the_named_adapter_trains_afterwards_and_the_old_one_stays():
    model = trained()
    before = file_tensors(model, "small")
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    grow_streams(model, "small", "large", 4)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
    model.set_adapter("large")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if ".large." in name
    }
    descend(model, 3)
    after = file_tensors(model, "small")
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_grown_adapter_is_saved_and_loaded_alone(tmp_path):
    model = trained()
    grow_streams(model, "small", "large", 8)
    expected = logits_of(model, "large")
    model.save_pretrained(tmp_path, selected_adapters=["large"])
    reloaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "large")
    assert reloaded.peft_config["default"].num_streams == 8
    assert torch.equal(logits(reloaded), expected)


def test_an_adapter_that_was_loaded_for_inference_grows_into_one_that_trains(tmp_path):
    trained().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_model(), tmp_path / "small", "small")
    grow_streams(model, "small", "large", 4)
    model.set_adapter("large")
    assert not model.peft_config["large"].inference_mode
    results = descend(model, 6)
    assert results[-1][0] < results[0][0]
    assert all(p.requires_grad == (".large." in name) for name, p in model.named_parameters())


@pytest.mark.parametrize("start", ["reparameterized", "tokens"])
def test_whatever_prefixes_started_from_they_grow_as_plain_ones(start):
    model = trained(init_weights=start)
    expected = logits(model)
    grow_streams(model, "small", "large", 4, perturbation=0.0)
    torch.testing.assert_close(logits_of(model, "large"), expected, atol=1e-5, rtol=1e-5)
    assert all(
        name.endswith(".weight") for name, _ in model.named_parameters() if "prefix" in name and ".large." in name
    )


@pytest.mark.parametrize("fields", [{}, {"stream_transform": "lora"}, {"stream_transform": TOGETHER}])
def test_shared_lora_and_saved_modules_are_copied(fields):
    lora = {"r": 2, "target_modules": ["q_proj", "down_proj"]}
    model = trained(lora=lora, modules_to_save=["lm_head"], **fields)
    expected = logits(model)
    grow_streams(model, "small", "large", 4, perturbation=0.0)
    assert torch.equal(logits(model), expected)
    torch.testing.assert_close(logits_of(model, "large"), expected, atol=1e-5, rtol=1e-5)
    descend(model, 3)
    torch.testing.assert_close(logits_of(model.eval(), "small"), expected)


@pytest.mark.parametrize("inference", [False, True])
def test_a_trained_backbone_is_handed_over(tmp_path, inference):
    model = trained(train_backbone=True)
    expected = logits(model)
    if inference:
        model.save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(tiny_model(), tmp_path / "small", "small")
    grow_streams(model, "small", "large", 4, perturbation=0.0)
    assert list(model.peft_config) == model.active_adapters == ["large"]
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    assert all(parameter.requires_grad for parameter in model.parameters())
    descend(model, 3)
    model.save_pretrained(tmp_path / "again")
    reloaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "again" / "large")
    assert torch.equal(logits(reloaded), logits(model.eval()))


@pytest.mark.parametrize("model_type", ["gpt2", "bloom", "mamba"])
def test_other_backbones_grow_too(model_type):
    model = trained(backbone=tiny_model(model_type, "eager"), stream_transform="lora")
    expected = logits(model)
    grow_streams(model, "small", "large", 4, perturbation=0.0)
    torch.testing.assert_close(logits_of(model, "large"), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none", "large", 4), r"`source` must name a loaded adapter, \['one', 'small'\], got 'none'"),
        (("small", "one", 4), "`target` must be a new name, got 'one', which is an adapter already"),
        (("small", "small", 4), "`target` must be a new name, got 'small'"),
        (("small", "large", 3), "`num_streams` must be a multiple of the 2 streams of 'small', at least 4, got 3"),
        (("small", "large", 2), "at least 4, got 2"),
        (("small", "large", 4.0), r"at least 4, got 4\.0"),
        (("one", "large", 4), "Adapter 'one' has one stream, .* add a new adapter with `num_streams=4`"),
        (("small", "large", 4, -0.1), "`perturbation` must be a number of at least 0, got -0.1"),
        (("small", "large", 4, float("nan")), "`perturbation` must be a number of at least 0, got nan"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(arguments, message):
    model = trained()
    model.add_adapter("one", ParScaleConfig(task_type="CAUSAL_LM", num_streams=1))
    names, expected = list(model.state_dict()), logits(model)
    with pytest.raises(ValueError, match=message):
        grow_streams(model, *arguments)
    assert list(model.state_dict()) == names
    assert list(model.peft_config) == ["small", "one"]
    assert torch.equal(logits(model), expected)


def test_other_models_are_refused():
    for model in (tiny_model(), get_peft_model(copy.deepcopy(tiny_model()), LoraConfig(target_modules=["q_proj"]))):
        with pytest.raises(TypeError, match="`model` must be a PeftModel with ParScale adapters"):
            grow_streams(model, "default", "large", 4)
