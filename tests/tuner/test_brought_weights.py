"""Adapters that bring weights of the backbone: trained copies, a resized embedding, or all of it."""

import warnings

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support.outputs import logits
from support.peft_methods import stir
from support.tiny_models import VOCABULARY, random_tokens, tiny_model, with_streams
from support.traces import traces
from support.trainers import word_tokenizer
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from parscale_adapt import ParScaleConfig


NEW_TOKENS = torch.tensor([[5, VOCABULARY + 1, VOCABULARY + 5, 7]])
EMBEDDINGS = ["embed_tokens", "lm_head"]
PREFIX = {"num_streams": 2, "num_prefix_tokens": 3}
RESIZED = {
    "LoRA with copies": LoraConfig(target_modules=["q_proj"], modules_to_save=EMBEDDINGS, task_type="CAUSAL_LM"),
    "LoRA": LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "copies": ParScaleConfig(**PREFIX, modules_to_save=EMBEDDINGS),
    "a copy of one": ParScaleConfig(**PREFIX, modules_to_save=["embed_tokens"]),
    "no copy": ParScaleConfig(**PREFIX),
    "linear layers": ParScaleConfig(num_streams=2, stream_transform="bitfit"),
    "all of it": ParScaleConfig(**PREFIX, train_backbone=True),
}


def resized(folder, seed, num_tokens=VOCABULARY + 7):
    """The saved backbone with more tokens, whose rows of the embeddings are as random as `seed` says."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(seed)
    model.resize_token_embeddings(num_tokens, mean_resizing=False)
    return model.eval()


def load(backbone, folder, **options):
    """An adapter from a file; nothing is said of another backbone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*another backbone")
        return PeftModel.from_pretrained(backbone, folder, **options)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("case", "has_name"),  # PEFT saves both embeddings of its own accord where it finds the backbone by its name
    [(case, True) for case in RESIZED] + [(case, False) for case in ("LoRA with copies", "copies", "all of it")],
)
def test_added_tokens_come_with_the_adapter_onto_a_backbone_that_is_resized_anew(tmp_path, case, has_name, tied):
    tiny_model(tie_word_embeddings=tied).save_pretrained(tmp_path / "backbone")
    backbone = resized(tmp_path / "backbone", seed=1)
    if not has_name:
        backbone.name_or_path = backbone.config._name_or_path = ""
    model = get_peft_model(backbone, RESIZED[case]).eval()
    stir(model)
    expected = logits(model, input_ids=NEW_TOKENS)
    model.save_pretrained(tmp_path / "adapter")
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = load(resized(tmp_path / "backbone", seed=2), tmp_path / "adapter", **options)
        assert torch.equal(logits(loaded, input_ids=NEW_TOKENS), expected)


@pytest.mark.parametrize("as_second", [False, True])
def test_an_embedding_that_is_not_brought_has_to_be_the_same(tmp_path, as_second):
    tiny_model().save_pretrained(tmp_path / "backbone")
    model = get_peft_model(resized(tmp_path / "backbone", seed=1), ParScaleConfig(**PREFIX))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    assert not any("embed" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    backbone = resized(tmp_path / "backbone", seed=2)
    other = get_peft_model(backbone, ParScaleConfig(num_streams=1), "first").eval() if as_second else None
    before, expected = traces(backbone), logits(backbone, input_ids=NEW_TOKENS)

    def attach(**options):
        if as_second:
            return other.load_adapter(tmp_path / "adapter", "default", **options)
        return PeftModel.from_pretrained(backbone, tmp_path / "adapter", **options)

    with pytest.raises(ValueError, match=r"weights differ .first in `model\.embed_tokens\.weight`"):
        attach()
    assert traces(backbone) == before
    assert all(p.requires_grad != as_second for name, p in backbone.named_parameters() if "parscale" not in name)
    assert torch.equal(logits(backbone, input_ids=NEW_TOKENS), expected)
    if not as_second:
        with pytest.warns(UserWarning, match="Going on because of `verify_backbone=False`") as caught:
            attach(verify_backbone=False)
        assert sum("another backbone" in str(each.message) for each in caught) == 1


def test_a_backbone_whose_vocabulary_was_not_resized_is_refused_with_both_sizes(tmp_path):
    tiny_model().save_pretrained(tmp_path / "backbone")
    model = get_peft_model(resized(tmp_path / "backbone", seed=1), RESIZED["copies"])
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r'"vocab_size": 97.* instead of .*"vocab_size": 104'):
        PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")


@pytest.mark.parametrize("num_streams", [1, 2])
def test_a_trained_backbone_replaces_the_weights_of_another_one_of_its_shape(tmp_path, num_streams):
    model = with_streams(tiny_model(), num_streams, train_backbone=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tiny_model(seed=1), tmp_path)), logits(model))
    with pytest.raises(ValueError, match=r'its shape is .*"num_hidden_layers": 3'):
        load(tiny_model(num_hidden_layers=3), tmp_path)


def test_only_what_copies_bring_may_differ(tmp_path):
    def backbone(of_norm=0.0, of_embedding=0.0):
        model = tiny_model()
        with torch.no_grad():
            model.model.norm.weight += of_norm
            model.model.embed_tokens.weight += of_embedding
        return model

    model = with_streams(tiny_model(), modules_to_save=["model.norm"])
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(backbone(of_norm=0.5), tmp_path)), logits(model))
    with pytest.raises(ValueError, match="its weights differ"):
        load(backbone(of_embedding=0.5), tmp_path)
    with_streams(tiny_model()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"first in `model\.norm\.weight`"):
        load(backbone(of_norm=0.5), tmp_path)


def test_a_backbone_that_was_left_trained_is_another_one(tmp_path):
    model = with_streams(tiny_model(), adapter_name="owner", train_backbone=True)
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.weight.mul_(1.1)
    trained = model.get_base_model().model.embed_tokens.weight.detach().clone()
    model.delete_adapter("owner")
    model.add_adapter("default", ParScaleConfig(**PREFIX))
    model.set_adapter("default")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trained on another backbone"):
        load(tiny_model(), tmp_path)
    backbone = tiny_model()
    backbone.model.embed_tokens.weight.data.copy_(trained)
    assert torch.equal(logits(load(backbone, tmp_path)), logits(model))


REFERENCE = "Adapter 'default' has `train_backbone=True` and is switched off while it trains"


def switched_off(model, times=2):
    """Warnings of a model that is run without its adapter a few times."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            with torch.no_grad(), model.disable_adapter():
                model(input_ids=random_tokens())
    return [str(each.message) for each in caught if "switched off" in str(each.message)]


@pytest.mark.parametrize("num_streams", [1, 2])
def test_a_trained_backbone_as_a_reference_of_its_own_training_is_warned_of_once(num_streams):
    model = with_streams(tiny_model(), num_streams, train_backbone=True).train()
    (message,) = switched_off(model)
    assert message.startswith(REFERENCE)
    assert "reference model of its own" in message
    assert switched_off(model) == []


def test_references_that_stay_are_not_warned_of(tmp_path):
    owner = with_streams(tiny_model(), train_backbone=True)
    assert switched_off(owner.eval()) == []
    owner.save_pretrained(tmp_path)
    assert switched_off(PeftModel.from_pretrained(tiny_model(), tmp_path).train()) == []
    assert switched_off(with_streams(tiny_model(), modules_to_save=["norm"]).train()) == []


def dpo_trainer(model, folder, config=None):
    rows = [{"prompt": "w5 w9", "chosen": " w7 w8", "rejected": " w3"} for _ in range(4)]
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    arguments = DPOConfig(output_dir=str(folder), max_steps=2, per_device_train_batch_size=2, **options)
    dataset = Dataset.from_list(rows)
    return DPOTrainer(
        model, None, arguments, train_dataset=dataset, processing_class=word_tokenizer(), peft_config=config
    )


@pytest.mark.parametrize("train_backbone", [False, True])
def test_dpo_hears_of_a_reference_that_moves(tmp_path, train_backbone):
    config = ParScaleConfig(**PREFIX, train_backbone=train_backbone)
    trainer = dpo_trainer(tiny_model(), tmp_path, config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert sum(REFERENCE in str(each.message) for each in caught) == train_backbone


def test_dpo_of_a_loaded_adapter_keeps_a_copy_of_it_as_its_reference(tmp_path):
    saved = with_streams(tiny_model(), init_weights="reparameterized")
    saved.save_pretrained(tmp_path)
    trainer = dpo_trainer(PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True), tmp_path)
    trainer.train()
    model = trainer.model.eval()
    moved = logits(model)
    model.set_adapter("ref")
    assert torch.equal(logits(model), logits(saved))
    assert not torch.equal(moved, logits(saved))
