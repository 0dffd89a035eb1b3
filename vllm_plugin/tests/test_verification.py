"""The failure to fear is a plugin that silently serves the backbone: at start-up it would be seen, and refused."""

import shutil

import pytest
import torch
from engines import Case, ask, engine, tokens_of
from safetensors.torch import load_file, save_file


REFUSAL = "What vLLM would serve is not what was exported: logits of the reference prompts are off by"


def refused(folder):
    with pytest.raises(ValueError, match=REFUSAL), engine(folder):
        pass


def test_a_prefix_that_is_not_written_is_noticed(four_streams, monkeypatch):
    from parscale_vllm.attention import StreamAttention

    monkeypatch.setattr(StreamAttention, "write_prefix", lambda layer: layer.kv_cache.zero_())
    refused(four_streams.folder)


def test_a_single_stream_is_noticed(four_streams, monkeypatch):
    from parscale_vllm.core.aggregator import DynamicAggregator

    def first_stream(aggregator, hidden_states):
        return hidden_states[: len(hidden_states) // aggregator.num_streams]

    monkeypatch.setattr(DynamicAggregator, "forward", first_stream)
    refused(four_streams.folder)


def test_exchanged_streams_are_noticed(four_streams, tmp_path):
    folder = shutil.copytree(four_streams.folder, tmp_path / "export")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.parscale.prefix_k.weight"
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder)


def test_a_missing_tensor_is_refused(four_streams, tmp_path):
    folder = shutil.copytree(four_streams.folder, tmp_path / "export")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.parscale.prefix_v.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="prefix_v"), engine(folder):
        pass


def test_without_the_prefix_and_with_one_stream_answers_differ(four_streams, monkeypatch):
    """The negative controls of the other tests: what they compare does depend on prefix and streams."""
    from parscale_vllm import model

    monkeypatch.setattr(model, "verify", lambda *args: None)
    with engine(four_streams.folder) as llm:
        assert tokens_of(ask(llm, four_streams.adapted["prompts"])) == four_streams.adapted["tokens"]
    with monkeypatch.context() as patch:
        patch.setattr(model.StreamAttention, "write_prefix", lambda layer: None)
        with engine(four_streams.folder) as llm:
            assert tokens_of(ask(llm, four_streams.adapted["prompts"])) != four_streams.adapted["tokens"]


def test_an_ordinary_model_beside_the_plugin_is_unchanged(four_streams):
    backbone = four_streams.folder.parent / "backbone"
    with engine(backbone) as llm:
        assert llm.llm_engine.model_config.architecture == "Qwen2ForCausalLM"
        assert tokens_of(ask(llm, four_streams.backbone["prompts"])) == four_streams.backbone["tokens"]


def test_an_export_without_an_index_of_its_weights_is_served(four_streams, tmp_path):
    """Those of parscale_adapt before it wrote one: vLLM reads the reference among the weights."""
    folder = shutil.copytree(four_streams.folder, tmp_path / "export")
    (folder / "model.safetensors.index.json").unlink()
    with engine(folder) as llm:
        assert tokens_of(ask(llm, four_streams.adapted["prompts"])) == four_streams.adapted["tokens"]


def test_a_prefix_that_is_loaded_into_a_running_engine_is_served(four_streams):
    weights = load_file(four_streams.folder / "model.safetensors")
    name = "model.layers.0.self_attn.parscale.prefix_v.weight"
    with engine(four_streams.folder, enable_prefix_caching=False) as llm:
        (model,) = llm.apply_model(lambda model: model)
        model.load_weights([(name, torch.zeros_like(weights[name]))])
        changed = tokens_of(ask(llm, four_streams.adapted["prompts"]))
        model.load_weights([(name, weights[name])])
        again = tokens_of(ask(llm, four_streams.adapted["prompts"]))
    assert changed != again == four_streams.adapted["tokens"]


def test_the_published_layout_of_the_authors_which_has_no_reference_is_served_with_a_warning(tmp_path, said):
    case = Case("published-p2")
    folder = shutil.copytree(case.folder, tmp_path / "export")
    (folder / "reference_logits.safetensors").unlink()
    with engine(folder) as llm:
        assert tokens_of(ask(llm, case.adapted["prompts"])) == case.adapted["tokens"]
    assert f"{folder} holds no reference logits, so what is served is not verified." in said
