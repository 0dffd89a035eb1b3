"""What attaching does to a user's configuration, and that it is done completely or not at all."""

import copy
import itertools

import pytest
import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTuner
from support.oracle import file_tensors
from support.outputs import logits
from support.peft_methods import PARSCALE, adapted, config, plain, stir, tensors_of, trainable
from support.tiny_models import tiny_model, with_streams
from support.traces import traces

from parscale_adapt import ParScaleConfig, grow_streams
from parscale_adapt.core.prefix import ReparameterizedPrefix
from parscale_adapt.tuner import attaching, hosts, layer, near_identity, start


BY_PEFT = ("base_model_name_or_path", "inference_mode")  # PEFT itself writes these into what it is given
PREFIX = {"num_streams": 2, "num_prefix_tokens": 3}


def fields_of(config):
    return {name: value for name, value in copy.deepcopy(config.to_dict()).items() if name not in BY_PEFT}


def prefixes(model):
    return {name: tensor for name, tensor in file_tensors(model).items() if "parscale_prefix" in name}


def is_reparameterized(model):
    return any(isinstance(module, ReparameterizedPrefix) for module in model.modules())


def saved(folder, adapter_name="default", **fields):
    """A folder with a trained adapter on `tiny_model()`."""
    given = with_streams(tiny_model(), adapter_name=adapter_name, **fields)
    given.save_pretrained(folder)
    return folder if adapter_name == "default" else folder / adapter_name


@pytest.mark.parametrize("method", PARSCALE)
def test_a_configuration_stays_as_the_user_made_it(tmp_path, method):
    given = config(method, modules_to_save=["lm_head"])
    before = fields_of(given)
    model = get_peft_model(tiny_model(), given)
    model.add_adapter("second", given)
    assert fields_of(given) == before
    assert model.peft_config["default"] is not model.peft_config["second"]
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(tiny_model(), tmp_path, config=given)
    inject_adapter_in_model(given, tiny_model())
    tiny_model().add_adapter(given)
    assert fields_of(given) == before
    assert (given.target_modules, given.backbone_fingerprint) == (None, None)


@pytest.mark.parametrize("init_weights", ["tokens", "near_identity", "reparameterized"])
def test_a_configuration_starts_every_adapter_in_the_way_that_it_names(init_weights):
    given = ParScaleConfig(**PREFIX, init_weights=init_weights)
    for seed in (0, 1):
        model = get_peft_model(tiny_model(seed=seed), given)
        assert is_reparameterized(model) == (init_weights == "reparameterized")
        if init_weights == "tokens":  # far from N(0, 0.02)
            assert all(tensor.std() > 0.2 for tensor in prefixes(model).values())


def test_one_configuration_on_two_backbones_saves_the_fingerprint_of_each(tmp_path):
    given = ParScaleConfig(**PREFIX)
    for seed in (0, 1):
        get_peft_model(tiny_model(seed=seed), given).save_pretrained(tmp_path / str(seed))
    for seed in (0, 1):
        PeftModel.from_pretrained(tiny_model(seed=seed), tmp_path / str(seed))
        with pytest.raises(ValueError, match="trained on another backbone"):
            PeftModel.from_pretrained(tiny_model(seed=1 - seed), tmp_path / str(seed))


def starting(by, backbone, read):
    """A new adapter by a configuration that was read from a file, in one of the ways that there are."""
    if by == "get_peft_model":
        return get_peft_model(backbone, read)
    if by == "transformers":
        backbone.add_adapter(read)
        return backbone
    model = get_peft_model(backbone, ParScaleConfig(num_streams=3, num_prefix_tokens=2), "first")
    model.add_adapter("default", read)
    model.set_adapter("default")
    return model


@pytest.mark.parametrize("by", ["get_peft_model", "add_adapter", "transformers"])
@pytest.mark.parametrize("reader", [ParScaleConfig, PeftConfig])
@pytest.mark.parametrize("init_weights", ["normal", "tokens", "reparameterized"])
def test_a_saved_configuration_starts_a_new_adapter_on_any_backbone(tmp_path, init_weights, reader, by):
    read = reader.from_pretrained(saved(tmp_path, init_weights=init_weights, init_std=0.02))
    read.inference_mode = False
    read.parscale_version = "0.0.1"
    before = fields_of(read)
    backbone = tiny_model("llama", seed=5, num_hidden_layers=3)
    model = starting(by, backbone, read)
    assert fields_of(read) == before
    found = model.peft_config["default"]
    assert '"model_type": "llama"' in found.backbone_fingerprint["shape"]
    assert len(found.target_modules) == 4
    assert found.to_dict()["parscale_version"] != "0.0.1"
    assert is_reparameterized(model) == (init_weights == "reparameterized")
    if by != "transformers":
        assert len(prefixes(model)) == 6
        spread = prefixes(model)["model.layers.0.self_attn.parscale_prefix_v"].std()
        assert spread > 0.1 if init_weights == "tokens" else spread < 0.1
        model.save_pretrained(tmp_path / "again", selected_adapters=["default"])
        PeftModel.from_pretrained(tiny_model("llama", seed=5, num_hidden_layers=3), tmp_path / "again")
    assert trainable(model)


def test_a_new_adapter_names_the_backbone_that_it_is_on(tmp_path):
    tiny_model(seed=3).save_pretrained(tmp_path / "backbone")
    model = with_streams(tiny_model())
    model.peft_config["default"].base_model_name_or_path = "some/other"
    model.save_pretrained(tmp_path / "adapter")
    read = ParScaleConfig.from_pretrained(tmp_path / "adapter")
    backbone = type(tiny_model()).from_pretrained(tmp_path / "backbone")
    model = get_peft_model(backbone, ParScaleConfig(**PREFIX))
    model.add_adapter("new", read)
    assert model.peft_config["new"].base_model_name_or_path == str(tmp_path / "backbone")
    assert read.base_model_name_or_path == "some/other"


@pytest.mark.parametrize("with_config", [False, True])
@pytest.mark.parametrize("init_weights", ["tokens", "near_identity", "reparameterized"])
def test_what_comes_from_a_file_is_given_no_start(tmp_path, monkeypatch, init_weights, with_config):
    folder = saved(tmp_path, init_weights=init_weights)
    for name in ("observe_token_states", "start_near_identity"):
        monkeypatch.setattr(attaching, name, lambda *args: pytest.fail("a start that a file replaces"))
    options = {"config": ParScaleConfig.from_pretrained(folder)} if with_config else {}
    loaded = PeftModel.from_pretrained(tiny_model(), folder, **options)
    loaded.load_adapter(folder, "second")
    assert not is_reparameterized(loaded)


def test_a_configuration_that_loaded_an_adapter_starts_the_next_one(tmp_path):
    folder = saved(tmp_path, init_weights="reparameterized")
    read = ParScaleConfig.from_pretrained(folder)
    assert not is_reparameterized(PeftModel.from_pretrained(tiny_model(), folder, config=read))
    assert is_reparameterized(get_peft_model(tiny_model(seed=1), read))
    with pytest.raises(ValueError, match="trained on another backbone"):
        PeftModel.from_pretrained(tiny_model(seed=1), folder, config=read)
    assert is_reparameterized(get_peft_model(tiny_model(seed=1), read))


def test_a_load_that_is_refused_for_its_model_leaves_the_configuration_ready(tmp_path):
    folder = saved(tmp_path, init_weights="reparameterized")
    read = ParScaleConfig.from_pretrained(folder)
    with pytest.raises(ValueError, match="already holds streams"):
        PeftModel.from_pretrained(with_streams(tiny_model()).get_base_model(), folder, config=read)
    assert is_reparameterized(get_peft_model(tiny_model(seed=1), read))


def test_another_adapter_by_the_configuration_of_a_loaded_one_has_tensors_of_the_same_names(tmp_path):
    """Trainers copy an adapter into a frozen reference so, name by name."""
    loaded = PeftModel.from_pretrained(tiny_model(), saved(tmp_path, init_weights="reparameterized"))
    fresh = with_streams(tiny_model(), init_weights="reparameterized")
    for each in (loaded, fresh):
        each.add_adapter("ref", each.peft_config["default"])
        names = tensors_of(each, "default")
        assert tensors_of(each, "ref") == {name.replace(".default.", ".ref.") for name in names}
    assert len(tensors_of(loaded, "ref")) == 8 < len(tensors_of(fresh, "ref"))


def test_an_option_of_lora_that_streams_do_not_have_is_refused(tmp_path):
    folder, backbone = saved(tmp_path), tiny_model()
    before = traces(backbone)
    with pytest.raises(ValueError, match="`ephemeral_gpu_offload`"):
        PeftModel.from_pretrained(backbone, folder, ephemeral_gpu_offload=True)
    assert traces(backbone) == before
    loaded = PeftModel.from_pretrained(backbone, folder)
    with pytest.raises(ValueError, match="`ephemeral_gpu_offload`"):
        loaded.load_adapter(folder, "second", ephemeral_gpu_offload=True)
    assert list(loaded.peft_config) == ["default"]
    assert "runtime_config" not in ParScaleConfig().to_dict()


@pytest.mark.parametrize("fields", [{}, {"stream_transform": "bitfit"}])
def test_the_linear_layers_of_a_saved_configuration_are_found_anew(tmp_path, fields):
    fields = {"num_streams": 2, **fields}
    get_peft_model(tiny_model(), ParScaleConfig(**fields)).save_pretrained(tmp_path)
    model = get_peft_model(tiny_model(num_hidden_layers=1), ParScaleConfig.from_pretrained(tmp_path))
    assert not any("layers.1" in name for name in model.peft_config["default"].target_modules)


def test_a_grown_adapter_keeps_the_fingerprint_and_the_users_configuration():
    given = ParScaleConfig(**PREFIX, init_weights="reparameterized")
    before = fields_of(given)
    model = get_peft_model(tiny_model(), given)
    grow_streams(model, "default", "large", 4)
    assert fields_of(given) == before
    small, large = model.peft_config["default"], model.peft_config["large"]
    assert (small.num_streams, large.num_streams) == (2, 4)
    assert small.backbone_fingerprint == large.backbone_fingerprint
    assert given.num_streams == 2


def attach(backbone, model, config):
    """A new adapter "second", on a backbone without a model or beside the adapters of one."""
    if model is None:
        return get_peft_model(backbone, config, "second")
    model.add_adapter("second", config)
    return model


def load(backbone, model, folder):
    """As [`attach`], from a file."""
    if model is None:
        return PeftModel.from_pretrained(backbone, folder, "second")
    model.load_adapter(folder, "second")
    return model


COPIED = {
    "an attention module": (["self_attn"], "self_attn", {}),
    "a part of its name, which is how PEFT compares": (["attn"], "self_attn", {}),
    "one attention module": (["layers.1.self_attn"], "model.layers.1.self_attn", {}),
    "a block": (["layers.0"], "model.layers.0.self_attn", {}),
    "all blocks": (["layers"], "model.layers.0.self_attn", {}),
    "the decoder": (["model"], "model", {}),
    "among others": (["lm_head", "self_attn"], "self_attn", {}),
    "an attention module beside other transforms": (["self_attn"], "self_attn", {"stream_transform": "bitfit"}),
    "an attention module beside one stream": (["self_attn"], "self_attn", {"num_streams": 1}),
    "a linear layer that holds biases": (["up_proj"], "mlp.up_proj", {"stream_transform": "bitfit"}),
    "linear layers that hold low-rank weights": (["mlp"], "mlp.", {"stream_transform": "lora"}),
    "our own layers": (["parscale"], "model", {}),
}


@pytest.mark.parametrize("case", COPIED)
@pytest.mark.parametrize("as_second", [False, True])
def test_modules_that_hold_streams_are_not_copied(case, as_second):
    wanted, named, fields = COPIED[case]
    backbone = tiny_model()
    model = with_streams(backbone) if as_second else None
    before, expected = traces(backbone), logits(backbone)
    given = ParScaleConfig(**{"num_streams": 2, **fields}, modules_to_save=wanted)
    with pytest.raises(ValueError, match=f"`modules_to_save` names {wanted[-1]!r}.*{named}.*leave it out"):
        attach(backbone, model, given)
    assert traces(backbone) == before
    assert torch.equal(logits(backbone), expected)


@pytest.mark.parametrize("wanted", ["lm_head", "embed_tokens", "norm", "mlp", "gate_proj"])
def test_modules_that_hold_no_streams_are_trained_and_saved(tmp_path, wanted):
    model = adapted("prefix", modules_to_save=[wanted])
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), expected)


class Interrupted(BaseException):
    """What a user's Ctrl-C raises, which is no `Exception`."""


def fail_at(monkeypatch, place, error):
    """Let the place where attaching is interrupted raise."""
    owner, name, n = place
    original, calls = getattr(owner, name), itertools.count(1)

    def failing(*args, **kwargs):
        if next(calls) == n:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)


PLACES = {
    "first attention layer": (layer.AttentionStreams, "update_layer", 1),
    "second attention layer": (layer.AttentionStreams, "update_layer", 2),
    "decoder": (layer.DecoderStreams, "update_layer", 1),
    "second linear layer": (layer.ProjectionStreams, "update_layer", 2),
    "placing the third module": (layer.ParScaleLayer, "_place", 3),
    "start": (start, "generate_tokens", 1),
    "start states": (layer.AttentionStreams, "start_from", 2),
    "near-identity fit": (near_identity, "_fit", 2),
    "near-identity comparison": (near_identity, "_log_probabilities", 4),
    "shared LoRA": (attaching, "inject_shared_lora", 1),
    "door": (hosts, "attach_streams", 1),
    "hooks": (layer.ProjectionStreams, "attach_hook", 3),
    "cast": (BaseTuner, "_cast_adapter_dtype", 1),
}
FIELDS = {
    "second linear layer": {"stream_transform": "lora"},
    "hooks": {"stream_transform": "bitfit"},
    "start": {"init_weights": "tokens", "num_prefix_tokens": 3},
    "start states": {"init_weights": "tokens", "num_prefix_tokens": 3},
    "near-identity fit": {"init_weights": "near_identity", "num_prefix_tokens": 3},
    "near-identity comparison": {"init_weights": "near_identity", "num_prefix_tokens": 3},
    "shared LoRA": {"lora": {"r": 2, "target_modules": ["q_proj"]}},
}


def requires_grad(model):
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def check_untouched(backbone, model, before, expected):
    assert traces(backbone) == before[0]
    assert requires_grad(backbone) == before[1]
    assert torch.equal(logits(backbone), expected)
    assert model is None or list(model.peft_config) == ["default"]


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), Interrupted("Ctrl-C")], ids=["error", "interrupt"])
@pytest.mark.parametrize(
    ("place", "as_second"),  # the door is open already when a second adapter comes
    [(place, as_second) for place in PLACES for as_second in (False, True) if (place, as_second) != ("door", True)],
)
def test_an_attach_that_fails_half_way_leaves_no_trace(monkeypatch, place, as_second, error):
    backbone = tiny_model()
    backbone.lm_head.requires_grad_(False)
    model = with_streams(backbone, stream_transform="bitfit", num_prefix_tokens=48) if as_second else None
    before, expected = (traces(backbone), requires_grad(backbone)), logits(backbone)
    given = ParScaleConfig(**{"num_streams": 3, "modules_to_save": ["norm"], **FIELDS.get(place, {})})
    with monkeypatch.context() as patch:
        fail_at(patch, PLACES[place], error)
        with pytest.raises(type(error), match=str(error)):
            attach(backbone, model, given)
    check_untouched(backbone, model, before, expected)
    model = attach(backbone, model, given)
    model.set_adapter("second")
    stir(model, "second")
    assert not torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain())


@pytest.mark.parametrize("as_second", [False, True])
def test_shared_lora_that_fits_nowhere_leaves_no_trace(as_second):
    backbone = tiny_model()
    model = with_streams(backbone) if as_second else None
    before, expected = (traces(backbone), requires_grad(backbone)), logits(backbone)
    for target in ("nothing", "rotary_emb"):  # not found, and found where no low-rank weights can be
        given = ParScaleConfig(
            num_streams=2, lora=LoraConfig(target_modules=["q_proj", target][target == "nothing" :])
        )
        with pytest.raises(ValueError, match=target if target == "nothing" else "not supported"):
            attach(backbone, model, given)
        check_untouched(backbone, model, before, expected)


@pytest.mark.parametrize("as_second", [False, True])
def test_a_file_that_does_not_fit_leaves_no_trace(tmp_path, as_second):
    folder = saved(tmp_path, lora={"r": 2, "target_modules": ["q_proj"]}, modules_to_save=["norm"])
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace('"num_streams": 2', '"num_streams": 4'))
    backbone = tiny_model()
    model = with_streams(backbone) if as_second else None
    before, expected = (traces(backbone), requires_grad(backbone)), logits(backbone)
    with pytest.raises(ValueError, match="does not hold the tensors"):
        load(backbone, model, folder)
    check_untouched(backbone, model, before, expected)
    path.write_text(path.read_text().replace('"num_streams": 4', '"num_streams": 2'))
    model = load(backbone, model, folder)
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(tiny_model(), folder)))


def test_a_load_whose_tensors_never_came_does_not_stand_in_the_way(tmp_path):
    folder, backbone = saved(tmp_path), tiny_model()
    weights = (folder / "adapter_model.safetensors").rename(folder / "elsewhere")
    before = traces(backbone)
    with pytest.raises(ValueError, match="Repo id must be"):  # what PEFT makes of a folder without its file
        PeftModel.from_pretrained(backbone, str(folder))
    weights.rename(folder / "adapter_model.safetensors")
    model = PeftModel.from_pretrained(backbone, folder)
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(tiny_model(), folder)))
    model.unload()
    assert traces(backbone) == before


def test_a_refused_fill_keeps_an_adapter_that_is_in_use(tmp_path):
    folder, model = saved(tmp_path, num_streams=4), with_streams(tiny_model())
    expected = logits(model)
    with pytest.raises(ValueError, match="does not hold the tensors"):
        model.load_adapter(folder, "default")
    assert torch.equal(logits(model), expected)
    assert list(model.peft_config) == ["default"]


def test_the_order_in_which_modules_are_visited_does_not_matter():
    """PEFT visits parents first today; linear layers need the layout that the decoder's layer knows."""
    backbone, reference = tiny_model(), adapted("BitFit")
    original = backbone.named_modules

    def backwards(*args, **kwargs):
        return reversed(list(original(*args, **kwargs)))

    backbone.named_modules = backwards
    model = get_peft_model(backbone, config("BitFit")).eval()
    del backbone.named_modules
    set_peft_model_state_dict(model, get_peft_model_state_dict(reference))
    assert torch.equal(logits(model), logits(reference))
