"""The failure to fear is a plugin that silently serves the backbone: at start-up it would be seen, and refused."""

import shutil

import pytest
import torch
from engines import Case, ask, engine, tokens_of
from safetensors.torch import load_file, save_file


REFUSAL = "What vLLM would serve is not what was exported: "
# Half precision rounds as much as many a damage changes; in a dtype narrower than the export's no tolerance was measured.
AS_SERVED = [("qwen2-p4", "float32"), ("bfloat16-p4", "bfloat16"), ("llama-p4", "bfloat16")]
in_every_precision = pytest.mark.parametrize(("name", "dtype"), AS_SERVED)


def refused(folder, dtype, problem=""):
    with pytest.raises(ValueError, match=REFUSAL + problem), engine(folder, dtype=dtype):
        pass


@in_every_precision
def test_a_prefix_that_is_not_written_is_noticed(name, dtype, monkeypatch):
    from parscale_vllm.attention import StreamAttention

    monkeypatch.setattr(StreamAttention, "write_prefix", lambda layer, empty=False: layer.kv_cache.zero_())
    refused(Case(name).folder, dtype)


@in_every_precision
def test_a_single_stream_is_noticed(name, dtype, monkeypatch):
    from parscale_vllm.core.aggregator import DynamicAggregator

    def first_stream(aggregator, hidden_states):
        return hidden_states[: len(hidden_states) // aggregator.num_streams]

    monkeypatch.setattr(DynamicAggregator, "forward", first_stream)
    refused(Case(name).folder, dtype)


@in_every_precision
def test_exchanged_streams_are_noticed(name, dtype, tmp_path):
    folder = shutil.copytree(Case(name).folder, tmp_path / "export")
    tensors = load_file(folder / "model.safetensors")
    for key in (key for key in tensors if ".prefix_" in key):
        tensors[key] = tensors[key].roll(1, 0).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, dtype)


class TestComparison:
    """What is found wrong, on logits that are made up."""

    @staticmethod
    def problem(served=0.0, empty=1.0, allowed=0.1, rounding=0.01):
        from parscale_vllm.verification import Comparison

        logits = [torch.full((2, 3), value) for value in (0.0, served, empty)]
        return Comparison(logits[0], logits[1], {"empty prefixes": logits[2]}, allowed, rounding).problem()

    def test_what_is_near_the_reference_and_no_control_is_served(self):
        assert self.problem(served=0.05) is None

    def test_what_is_off_by_more_than_is_allowed(self):
        assert "are off by 0.2, and 0.1 is allowed" in self.problem(served=0.2)

    @pytest.mark.parametrize("allowed", [2, None])
    def test_what_is_no_number(self, allowed):
        assert "no numbers" in self.problem(served=float("nan"), allowed=allowed)

    @pytest.mark.parametrize("allowed", [2, None])
    def test_what_is_a_control(self, allowed):
        assert self.problem(served=1.0, allowed=allowed) == "its logits are those of empty prefixes"

    def test_what_is_no_nearer_than_a_control(self):
        assert "no nearer to those of the export than those of empty prefixes" in self.problem(0.9, 1.0, allowed=None)

    def test_controls_that_differ_by_less_than_the_rounding_say_nothing(self):
        assert self.problem(served=0.9, empty=1.0, allowed=None, rounding=0.1) is None


def test_a_missing_tensor_is_refused(four_streams, tmp_path):
    folder = shutil.copytree(four_streams.folder, tmp_path / "export")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.parscale.prefix_v.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="prefix_v"), engine(folder):
        pass


@pytest.mark.parametrize("is_broken", [False, True])
def test_without_the_prefix_answers_differ(four_streams, monkeypatch, is_broken):
    """The negative control of the other tests: what they compare depends on the prefix. Nothing is verified here."""
    from parscale_vllm import model

    monkeypatch.setattr(model, "verify", lambda *args: None)
    if is_broken:
        monkeypatch.setattr(model.StreamAttention, "write_prefix", lambda layer: None)
    with engine(four_streams.folder) as llm:
        answers = tokens_of(ask(llm, four_streams.adapted["prompts"]))
    assert (answers != four_streams.adapted["tokens"]) is is_broken


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
