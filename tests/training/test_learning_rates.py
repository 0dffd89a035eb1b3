"""Learning rates of their own: the groups of an optimizer, in trainers of others and in ours."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.tiny_models import random_tokens, tiny_model, with_streams
from support.trainers import rows_of_uneven_lengths, trainer_of, word_tokenizer
from trl import SFTTrainer

from parscale_adapt import ParScaleConfig, Qwen2ParScaleConfig, Qwen2ParScaleForCausalLM, parameter_groups
from parscale_adapt.training import StreamConfig, StreamTrainer
from parscale_adapt.training.learning_rates import advised_rates


RATES = {"prefix_learning_rate": 1e-2, "aggregator_learning_rate": 3e-4, "lora_learning_rate": 1e-3}
ADAM = {"optim": "adamw_torch", "weight_decay": 0.1, "learning_rate": 1e-4}
TOGETHER = {"stream_transform": ["prefix", "lora"]}
SHARED_LORA = LoraConfig(r=2, target_modules=["q_proj"])


def with_shared_lora(**fields):
    return get_peft_model(tiny_model(), ParScaleConfig(num_streams=2, num_prefix_tokens=3, lora=SHARED_LORA, **fields))


def stream_trainer(model, folder, **options):
    defaults = trainer_of(with_streams(tiny_model()), folder).args
    kept = ("per_device_train_batch_size", "max_grad_norm", "logging_steps", "use_cpu", "bf16", "max_length")
    settings = {name: getattr(defaults, name) for name in kept}
    settings |= {"save_strategy": "no", "report_to": "none", "gradient_checkpointing": False, "disable_tqdm": True}
    settings |= {"max_steps": 1, "lr_scheduler_type": "constant", **ADAM, **options}
    arguments = StreamConfig(output_dir=str(folder), **settings)
    return StreamTrainer(model, arguments, train_dataset=rows_of_uneven_lengths(), processing_class=word_tokenizer())


def described(groups, model):
    """Rate and weight decay of every trained parameter, by name; each stands in one group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for group in groups:
        assert group["params"]
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in found
            found[name] = (group["lr"], group["weight_decay"])
    assert set(found) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return found


@pytest.mark.parametrize("fields", [{}, {"init_weights": "reparameterized"}, {"stream_transform": "bitfit"}, TOGETHER])
@pytest.mark.parametrize("trains_backbone", [False, True])
def test_every_part_has_its_rate_and_biases_and_norms_do_not_decay(fields, trains_backbone):
    if "prefix" in fields.get("stream_transform", "prefix"):
        fields = {"num_prefix_tokens": 3, **fields}
    rates = {name: rate for name, rate in RATES.items() if not (trains_backbone and name.startswith("lora"))}
    shared = {"train_backbone": True} if trains_backbone else {"lora": SHARED_LORA}
    model = get_peft_model(tiny_model(), ParScaleConfig(num_streams=2, **fields, **shared))
    for name, (rate, decay) in described(
        parameter_groups(model, learning_rate=1e-5, weight_decay=0.1, **rates), model
    ).items():
        if ".parscale_aggregator." in name:
            assert rate == 3e-4, name
        elif ".parscale_" in name:
            assert rate == 1e-2, name
        elif ".lora_" in name:
            assert rate == 1e-3, name
        else:
            assert rate == 1e-5, name
        assert decay == (0.0 if "bias" in name or "norm" in name else 0.1), name


@pytest.mark.parametrize("fields", [{}, {"train_backbone": True}])
def test_decay_is_that_of_transformers(tmp_path, fields):
    model = with_streams(tiny_model(), **fields)
    theirs = trainer_of(model, tmp_path, **ADAM).create_optimizer()
    assert described(parameter_groups(model, learning_rate=1e-4, weight_decay=0.1), model) == described(
        theirs.param_groups, model
    )


def test_the_published_model_has_groups_too():
    config = Qwen2ParScaleConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        parscale_n=2,
        parscale_n_tokens=3,
    )
    model = Qwen2ParScaleForCausalLM(config)
    groups = parameter_groups(model, learning_rate=1e-5, prefix_learning_rate=1e-2, aggregator_learning_rate=3e-4)
    for name, (rate, _) in described(groups, model).items():
        expected = 1e-2 if ".prefix_" in name else 3e-4 if ".aggregate_layer." in name else 1e-5
        assert rate == expected, name


def test_a_trainer_of_others_trains_by_them_and_a_scheduler_keeps_their_ratio(tmp_path):
    model = with_shared_lora()
    arguments = trainer_of(with_streams(tiny_model()), tmp_path, max_steps=3, lr_scheduler_type="linear").args
    optimizer = torch.optim.SGD(parameter_groups(model, learning_rate=1.0, prefix_learning_rate=0.5))
    rows, tokenizer = rows_of_uneven_lengths(), word_tokenizer()
    trainer = SFTTrainer(
        model, arguments, train_dataset=rows, processing_class=tokenizer, optimizers=(optimizer, None)
    )
    seen = []
    step = torch.optim.SGD.step
    optimizer.step = lambda *args: seen.append([group["lr"] for group in optimizer.param_groups]) or step(optimizer)
    trainer.train()
    assert len(seen) == 3
    for index, rates in enumerate(seen):
        parts = [group["part"] for group in optimizer.param_groups]
        expected = [(0.5 if part == "prefix" else 1.0) * (1 - index / 3) for part in parts]
        assert rates == pytest.approx(expected)


def test_stream_trainer_trains_and_logs_every_part_by_its_rate(tmp_path):
    def first_changes(**rates):
        model = with_shared_lora()
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        trainer = stream_trainer(model, tmp_path, optim="sgd", weight_decay=0.0, learning_rate=1.0, **rates)
        trainer.train()
        after = dict(model.named_parameters())
        return {name: after[name].detach() - value for name, value in before.items()}, trainer.state.log_history[0]

    plain, plain_log = first_changes()
    assert not [name for name in plain_log if name.startswith("learning_rate/")]
    changes, log = first_changes(prefix_learning_rate=0.5, aggregator_learning_rate=0.125)
    for name, change in plain.items():
        factor = 0.125 if ".parscale_aggregator." in name else 0.5 if ".parscale_" in name else 1.0
        torch.testing.assert_close(changes[name], change * factor, atol=1e-6, rtol=1e-3, msg=name)
        assert change.any() or "lora_A" in name
    logged = {name: value for name, value in log.items() if name.startswith("learning_rate")}
    assert logged == {
        "learning_rate": 1.0,
        "learning_rate/prefix": 0.5,
        "learning_rate/aggregator": 0.125,
        "learning_rate/lora": 1.0,
    }


def test_rates_are_logged_as_they_fall_and_survive_a_resume(tmp_path):
    options = {"max_steps": 4, "lr_scheduler_type": "linear", "save_strategy": "steps", "save_steps": 2}
    options |= {"prefix_learning_rate": 1e-2, "aggregator_learning_rate": 3e-4, "learning_rate": 1e-4}
    whole = stream_trainer(with_shared_lora(), tmp_path, **options)
    whole.train()
    steps = [entry for entry in whole.state.log_history if "loss" in entry]
    for index, entry in enumerate(steps):
        assert entry["learning_rate"] == pytest.approx(1e-4 * (1 - index / 4))
        assert entry["learning_rate/prefix"] == pytest.approx(1e-2 * (1 - index / 4))
        assert entry["learning_rate/aggregator"] == pytest.approx(3e-4 * (1 - index / 4))
    resumed = stream_trainer(with_shared_lora(), tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    again = [entry for entry in resumed.state.log_history if "loss" in entry]
    names = ("loss", "learning_rate", "learning_rate/prefix", "learning_rate/aggregator", "learning_rate/lora")
    assert [[entry[name] for name in names] for entry in again] == [[entry[name] for name in names] for entry in steps]


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "paged_adamw_8bit"])
def test_optimizers_of_8_bits_hold_the_rates(tmp_path, optim):
    pytest.importorskip("bitsandbytes")
    model = with_shared_lora()
    trainer = stream_trainer(model, tmp_path, optim=optim, **RATES)
    trainer.train()
    rates = {group["part"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == {"prefix": 1e-2, "aggregator": 3e-4, "lora": 1e-3}


@pytest.mark.parametrize(
    ("fields", "rate", "reason"),
    [
        ({}, "lora_learning_rate", "no shared LoRA is trained in this model, only aggregator, prefix"),
        ({"aggregator": "mean"}, "aggregator_learning_rate", "no aggregator with parameters is trained"),
        ({"num_streams": 1, "train_backbone": True}, "prefix_learning_rate", "no prefix, LoRA or bias of a stream is"),
        ({"num_streams": 1, "train_backbone": True}, "aggregator_learning_rate", "only backbone: leave it out"),
    ],
)
def test_a_rate_for_what_is_not_trained_is_refused(tmp_path, fields, rate, reason):
    config = ParScaleConfig(**{"num_streams": 2, "num_prefix_tokens": 3, **fields})
    for refusing in (
        lambda model: parameter_groups(model, learning_rate=1e-3, **{rate: 0.01}),
        lambda model: stream_trainer(model, tmp_path, **{rate: 0.01}),
    ):
        with pytest.raises(ValueError, match=f"`{rate}` is 0.01, but .*{reason}"):
            refusing(get_peft_model(tiny_model(), config))


@pytest.mark.parametrize("value", [0.0, -1e-3, math.nan, math.inf, True, "1e-3"])
@pytest.mark.parametrize("name", ["learning_rate", *RATES])
def test_a_rate_is_positive_and_finite(tmp_path, name, value):
    expected = f"`{name}` must be a positive, finite number, got {value!r}"
    with pytest.raises(ValueError, match=expected):
        StreamConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, **{name: value})
    with pytest.raises(ValueError, match=expected):
        parameter_groups(with_shared_lora(), **{"learning_rate": 1e-3, name: value})


def test_what_would_not_reach_the_optimizer_is_refused(tmp_path):
    model = with_shared_lora()
    arguments = stream_trainer(model, tmp_path, **RATES).args
    given = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    options = {"train_dataset": rows_of_uneven_lengths(), "processing_class": word_tokenizer()}
    with pytest.raises(ValueError, match="would not reach the optimizer that was given as `optimizers`"):
        StreamTrainer(model, arguments, optimizers=(given, None), **options)
    layerwise = stream_trainer(model, tmp_path, **RATES)
    layerwise.optimizer_cls_and_kwargs = (LayerWise, {})
    with pytest.raises(ValueError, match=r"LayerWise.* in a way of its own.*choose another --optim"):
        layerwise.train()


class LayerWise(torch.optim.SGD):
    """Stands for optimizers that step in hooks on the parameters, and hold a dummy in their groups."""

    def __init__(self, groups):
        super().__init__([torch.nn.Parameter(random_tokens(1, 1).float())], lr=1.0)


@pytest.mark.parametrize(
    ("fields", "rate"),
    [
        ({"num_prefix_tokens": 3}, 1e-2),
        ({"num_prefix_tokens": 3, "init_weights": "reparameterized"}, 3e-3),
        ({"num_prefix_tokens": 3, "lora": SHARED_LORA}, 3e-3),
        ({"num_prefix_tokens": 3, **TOGETHER}, 3e-3),
        ({"stream_transform": "lora"}, 2e-3),
        ({"stream_transform": "bitfit"}, 2e-3),
    ],
)
def test_the_advice_is_what_the_sweeps_found(fields, rate):
    model = get_peft_model(tiny_model(), ParScaleConfig(num_streams=2, **fields))
    expected = {"prefix": rate, "aggregator": 3e-4} | ({"lora": 1e-3} if "lora" in fields else {})
    assert advised_rates(model) == expected


def test_the_advice_names_only_what_is_trained():
    whole = get_peft_model(tiny_model(), ParScaleConfig(num_streams=2, num_prefix_tokens=3, train_backbone=True))
    assert advised_rates(whole) == {"prefix": 1e-2, "aggregator": 3e-4, "backbone": 3e-5}
    mean = get_peft_model(tiny_model(), ParScaleConfig(num_streams=2, num_prefix_tokens=3, aggregator="mean"))
    assert advised_rates(mean) == {"prefix": 1e-2}
    assert advised_rates(tiny_model()) == {"backbone": 3e-5}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"prefix": 3e-3, "aggregator": 3e-4, "lora": 1e-3}),
        ({"prefix_learning_rate": 0.5}, {"prefix": 0.5, "aggregator": 3e-4, "lora": 1e-3}),
        ({"learning_rate": 0.25, "prefix_learning_rate": 0.5}, {"prefix": 0.5, "aggregator": 0.25, "lora": 0.25}),
    ],
)
def test_a_run_without_a_rate_takes_the_advice(tmp_path, given, expected):
    trainer = stream_trainer(with_shared_lora(), tmp_path, **{"learning_rate": None, **given})
    trainer.train()
    log = trainer.state.log_history[0]
    assert {name: log[f"learning_rate/{name}"] for name in expected} == pytest.approx(expected)


def test_an_optimizer_of_ones_own_keeps_its_rates(tmp_path):
    model = with_shared_lora()
    settings = {"save_strategy": "no", "report_to": "none", "max_steps": 1, "use_cpu": True, "bf16": False}
    optimizer = torch.optim.SGD(parameter_groups(model, learning_rate=0.5))
    trainer = StreamTrainer(
        model,
        StreamConfig(output_dir=str(tmp_path), lr_scheduler_type="constant", **settings),
        train_dataset=rows_of_uneven_lengths(),
        processing_class=word_tokenizer(),
        optimizers=(optimizer, None),
    )
    trainer.train()
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
