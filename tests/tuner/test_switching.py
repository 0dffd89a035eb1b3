"""P = 2, 4, 8 and LoRA adapters on one resident backbone, in any order of switches."""

import gc
import itertools
import random
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from support.oracle import logits_by_hand
from support.outputs import logits
from support.tiny_models import random_tokens, tiny_model
from transformers import DynamicCache

from parscale_adapt import ParScaleConfig


pytestmark = pytest.mark.slow


ON_ATTENTION = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
ON_MLP = {"r": 4, "lora_alpha": 16, "target_modules": ["down_proj"]}
ADAPTERS = {
    "p2": {"num_streams": 2, "num_prefix_tokens": 3},
    "p4": {"num_streams": 4, "stream_transform": "lora", "aggregator": "static"},
    "p8": {"num_streams": 8, "stream_transform": "bitfit", "aggregator": "mean"},
    "together": {"num_streams": 3, "num_prefix_tokens": 5, "stream_transform": ["prefix", "lora"]},
    "p1": {"num_streams": 1},
    "low rank": {"num_streams": 1, "lora": ON_ATTENTION},
    "lower rank": {"num_streams": 1, "lora": ON_MLP},
    "joint": {"num_streams": 2, "num_prefix_tokens": 3, "lora": ON_MLP},
    "both": {"num_streams": 3, "stream_transform": "lora", "lora": ON_ATTENTION},
}


def config(name):
    return ParScaleConfig(task_type="CAUSAL_LM", init_std=0.5, **ADAPTERS[name])


def own_parameters(model, name):
    """By a road of its own: all that was not there before and carries the adapter's name, wrapped or not."""
    parameters = {n.replace(".base_layer", ""): p for n, p in model.base_model.model.named_parameters()}
    backbone = {n for n, _ in tiny_model().named_parameters()}
    return {n: p for n, p in parameters.items() if n not in backbone and f".{name}." in n}


@torch.no_grad()
def take_over(model, name, source):
    """Give an adapter the tensors that it has in another model."""
    tensors, own = own_parameters(source, name), own_parameters(model, name)
    assert own.keys() == tensors.keys()
    for key, parameter in own.items():
        parameter.copy_(tensors[key])


@torch.no_grad()
def moved(model, names):
    """As after training: every adapter's tensors have moved, each adapter its own way."""
    for index, name in enumerate(ADAPTERS):
        if name in names:
            generator = torch.Generator().manual_seed(index)
            for _, parameter in sorted(own_parameters(model, name).items()):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def on_one_backbone(names=tuple(ADAPTERS)):
    torch.manual_seed(1)
    first, *others = names
    model = get_peft_model(tiny_model(), config(first), first)
    for name in others:
        model.add_adapter(name, config(name))
    return moved(model, names)


@pytest.fixture(scope="module")
def alone():
    """The logits of every adapter, alone on its backbone, with the tensors that it has among the others."""
    together, found = on_one_backbone(), {}
    for name in ADAPTERS:
        model = on_one_backbone([name])
        take_over(model, name, together)
        found[name] = logits(model)
    assert torch.equal(found["p1"], logits(tiny_model()))
    for one, other in itertools.combinations(found.values(), 2):
        assert (one - other).abs().max() > 0.05
    return found


def check(model, name, alone):
    assert model.active_adapters == [name]
    assert torch.equal(logits(model), alone[name])
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in own_parameters(model, name).values()}
    assert model.peft_config[model.active_adapter].num_streams == ADAPTERS[name]["num_streams"]


@pytest.mark.parametrize("seed", range(3))
def test_after_any_order_of_switches_an_adapter_gives_what_it_gives_alone(alone, seed):
    names = list(ADAPTERS)
    random.Random(seed).shuffle(names)
    model = on_one_backbone()
    plain = logits(tiny_model())
    for name in names + names[::-2]:
        model.set_adapter(name)
        check(model, name, alone)
        with model.disable_adapter():
            assert torch.equal(logits(model), plain)
        check(model, name, alone)


@pytest.mark.parametrize("name", ADAPTERS)
def test_one_forward_per_stream_gives_the_same(name):
    model = on_one_backbone()
    model.set_adapter(name)
    torch.testing.assert_close(logits(model), logits_by_hand(model, input_ids=random_tokens()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_adapters_come_and_go_in_any_order(alone, seed):
    chance = random.Random(seed)
    names = list(ADAPTERS)
    chance.shuffle(names)
    model = on_one_backbone(names[:3])
    present, absent = names[:3], names[3:]
    together = on_one_backbone()
    for _ in range(12):
        if absent and (len(present) < 2 or chance.random() < 0.5):
            name = absent.pop(chance.randrange(len(absent)))
            active = model.active_adapters
            model.add_adapter(name, config(name))
            assert model.active_adapters == active
            present.append(name)
        else:
            name = present.pop(chance.randrange(len(present)))
            model.delete_adapter(name)
            absent.append(name)
        assert not any(f".{name}." in n for name in absent for n, _ in model.named_parameters())
        for name in present:
            take_over(model, name, together)
        check(model, model.active_adapter, alone)
        name = chance.choice(present)
        model.set_adapter(name)
        check(model, name, alone)


def test_the_deleted_active_adapter_is_followed_by_another_everywhere(alone):
    model = on_one_backbone()
    model.set_adapter("p8")
    order = ["p8", "both", "joint", "low rank", "lower rank", "p1", "p2", "p4", "together"]
    for deleted, following in itertools.pairwise(order):
        with pytest.warns(UserWarning, match=f"{deleted} was active which is now deleted. Setting .* to {following}"):
            model.delete_adapter(deleted)
        check(model, following, alone)
        active = {tuple(layer.active_adapters) for layer in model.get_layer_status()}
        assert active == {(following,)}
    model.delete_adapter("together")
    assert model.active_adapters == []
    assert torch.equal(logits(model.base_model.model), logits(tiny_model()))


def test_the_memory_of_a_deleted_adapter_is_released():
    names = ["low rank", *(name for name in ADAPTERS if name != "low rank")]
    model = on_one_backbone(names)
    sizes = {name: sum(p.numel() for p in own_parameters(model, name).values()) for name in names}
    remaining = sum(p.numel() for p in model.parameters())
    assert remaining == sum(sizes.values()) + sum(p.numel() for p in tiny_model().parameters())
    for name in names[1:]:
        references = [weakref.ref(parameter) for parameter in own_parameters(model, name).values()]
        assert bool(references) == (name != "p1")
        model.delete_adapter(name)
        gc.collect()
        assert not any(reference() is not None for reference in references)
        remaining -= sizes[name]
        assert sum(p.numel() for p in model.parameters()) == remaining
    model.delete_adapter("low rank")
    kept = {n for n, _ in model.base_model.model.named_parameters()}
    assert kept == {n for n, _ in tiny_model().named_parameters()}
    assert not any(isinstance(module, LoraLayer) for module in model.modules())


def test_unloading_after_many_switches_leaves_the_backbone():
    backbone = tiny_model()
    names = [name for name, _ in backbone.named_modules()]
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in backbone.modules())
    torch.manual_seed(1)
    model = get_peft_model(backbone, config("p2"), "p2")
    for name in list(ADAPTERS)[1:]:
        model.add_adapter(name, config(name))
        model.set_adapter(name)
    assert model.unload() is backbone
    assert [name for name, _ in backbone.named_modules()] == names
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in backbone.modules())
    assert torch.equal(logits(backbone), logits(tiny_model()))


@pytest.mark.parametrize("first", ["low rank", "both", "p1"])
def test_a_cache_is_not_continued_by_another_adapter(first):
    model = on_one_backbone()
    for second in ("low rank", "lower rank", "both", "p1"):
        cache = DynamicCache(config=model.config)
        model.set_adapter(first)
        model(input_ids=random_tokens(), past_key_values=cache)
        model.set_adapter(second)
        if first == second:
            model(input_ids=random_tokens(length=1), past_key_values=cache)
            continue
        owners = [f"the adapter '{name}'" for name in (first, second)]
        with pytest.raises(ValueError, match=f"was filled by {owners[0]} and can't be continued by {owners[1]}"):
            model(input_ids=random_tokens(length=1), past_key_values=cache)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("names", [[*ADAPTERS, "__base__", "joint"], ["low rank", "p1", "lower rank", "__base__"]])
def test_one_batch_mixes_adapters_of_every_kind(alone, names, use_cache):
    model = on_one_backbone()
    tokens = random_tokens(len(names), 7, seed=9)
    mixed = logits(model, input_ids=tokens, adapter_names=names, use_cache=use_cache)
    generated = model.generate(
        input_ids=tokens, adapter_names=names, use_cache=use_cache, max_new_tokens=5, do_sample=False
    )
    for sample, name in enumerate(names):
        model.set_adapter("p1" if name == "__base__" else name)
        torch.testing.assert_close(mixed[sample], logits(model, input_ids=tokens[sample, None])[0], atol=1e-4, rtol=0)
        expected = model.generate(input_ids=tokens[sample, None], max_new_tokens=5, do_sample=False)[0]
        found = generated[sample, : len(expected)]
        assert torch.equal(found, expected), name
    check(model, model.active_adapter, alone)


def test_training_one_adapter_changes_no_other(alone):
    model = on_one_backbone()
    for name in ("joint", "both", "low rank"):
        model.set_adapter(name)
        before = {n: p.clone() for n, p in model.named_parameters()}
        model.train()(input_ids=random_tokens(), labels=random_tokens()).loss.backward()
        touched = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
        model.zero_grad()
        assert touched == {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} != set()
        assert all(f".{name}." in n for n in touched)
        model.eval()
    for name in ("p2", "p4", "p8", "p1", "lower rank"):
        model.set_adapter(name)
        check(model, name, alone)


def test_a_lora_adapter_of_peft_itself_stays_refused():
    model = on_one_backbone(["p2"])
    with pytest.raises(ValueError, match="peft types"):
        model.add_adapter("other", LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
