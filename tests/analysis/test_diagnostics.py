"""Stream diagnostics against a road of their own: one stock forward per stream, its prefix in a stock cache."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.tiny_models import VOCABULARY, random_tokens, tiny_model, with_streams
from transformers import DynamicCache

from parscale_adapt.analysis.diagnostics import diagnose, residual_correlation
from parscale_adapt.analysis.diagnostics_plots import plot_diagnostics
from parscale_adapt.analysis.scaling_law import DiversityLaw
from parscale_adapt.analysis.stream_states import find_layers, find_streams
from parscale_adapt.core.aggregator import Aggregator
from parscale_adapt.core.weight_statistics import stream_statistics, weight_sums
from parscale_adapt.data import PackedCollator


NUM_STREAMS = 4
EXACT = {"rel": 1e-5, "abs": 1e-6}


def sharp(model):
    """Let the aggregator's weights differ clearly from stream to stream and from token to token."""
    aggregator = find_streams(model).aggregator
    with torch.no_grad():
        aggregator[2].bias.copy_(torch.tensor([0.3, 1.2, -0.5, 0.8, 0.1, -0.2, 0.4, 0.9][: aggregator.num_streams]))
    return model


@pytest.fixture
def model():
    return sharp(with_streams(tiny_model(), NUM_STREAMS))


def packed_batches(sizes_of_batches=(((5, 4), (9,)), ((6, 2),))):
    """Rows of several documents, the second batch with other numbers of rows and of targets."""
    batches = []
    for index, rows in enumerate(sizes_of_batches):
        rows = [
            {"input_ids": random_tokens(1, sum(sizes), seed=10 * index + row)[0].tolist(), "seq_lengths": list(sizes)}
            for row, sizes in enumerate(rows)
        ]
        batches.append(PackedCollator(0)(rows))
    return batches


def single_documents():
    return [
        PackedCollator(0)([{"input_ids": random_tokens(1, n, seed=n)[0].tolist(), "seq_lengths": [n]}]) for n in (8, 5)
    ]


def own_loss(model, batches):
    """Token-weighted loss of a model by its own forward."""
    total = count = 0
    for batch in batches:
        num_targets = (batch["labels"][:, 1:] != -100).sum().item()
        total += model(**batch).loss.item() * num_targets
        count += num_targets
    return total / count


class BruteForce:
    """Everything of one document by stock transformers: one forward per stream, its prefix in a stock cache."""

    def __init__(self, model, batch):
        config = model.active_peft_config
        plain = tiny_model()
        tensors = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters()}
        length = batch["input_ids"].shape[1]
        self.head = plain.lm_head
        self.targets = batch["input_ids"][0, 1:]
        self.layers = []
        for stream in range(config.num_streams):
            cache = DynamicCache(config=plain.config)
            for index in range(plain.config.num_hidden_layers):
                name = f"model.layers.{index}.self_attn.parscale.parscale_prefix_"
                key, value = (tensors[f"{name}{kind}.default.weight"][stream][None] for kind in "kv")
                cache.update(key, value, index)
            hidden = plain.model(
                batch["input_ids"],
                past_key_values=cache,
                position_ids=torch.arange(length)[None],
                output_hidden_states=True,
            ).hidden_states
            self.layers.append(torch.stack(hidden[1:])[:, 0, :-1])
        self.layers = torch.stack(self.layers)  # [P, layers, N, H], the last one after the final norm
        model(**batch)
        self.weights = find_streams(model).aggregator.last_weights[0, :-1]

    def log_probs(self, hidden):
        return torch.log_softmax(self.head(hidden).double(), -1).gather(-1, self.targets[:, None])[:, 0]

    def own_log_probs(self):
        return torch.stack([self.log_probs(hidden) for hidden in self.layers[:, -1]])

    def mixture_log_probs(self, streams, weights=None):
        weights = (self.weights if weights is None else weights)[:, streams]
        weights = weights / weights.sum(-1, keepdim=True)
        return self.log_probs(torch.einsum("np,pnh->nh", weights, self.layers[streams, -1]))


@pytest.fixture
def brute(model):
    find_streams(model).aggregator.record_weights = True
    with torch.no_grad():
        return [BruteForce(model, batch) for batch in single_documents()]


def mean_loss(log_probs):
    return -torch.cat(list(log_probs)).mean().item()


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("qwen2", {}),
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": 2.0}),
        ("cohere", {"logit_scale": 0.3}),
        ("gpt2", {}),
        ("qwen3_moe", {}),
    ],
)
def test_the_loss_of_the_learned_mixture_is_the_models_own_loss(model_type, changes):
    model = sharp(with_streams(tiny_model(model_type, "eager", **changes), 3))
    found = diagnose(model, packed_batches())
    assert found.num_tokens == sum((batch["labels"] != -100).sum().item() for batch in packed_batches())
    with torch.no_grad():
        assert found.mixture_loss == pytest.approx(own_loss(model, packed_batches()), **EXACT)
    assert abs(found.mixture_loss - found.plain_mean_loss) > 1e-4


def test_each_stream_alone_has_the_loss_of_a_plain_forward_with_its_prefix(model, brute):
    found = diagnose(model, single_documents())
    for stream in range(NUM_STREAMS):
        expected = mean_loss(run.own_log_probs()[stream] for run in brute)
        assert found.own_loss[stream] == pytest.approx(expected, **EXACT)
    assert len({round(loss, 3) for loss in found.own_loss}) == NUM_STREAMS


def test_mixtures_of_all_and_of_fewer_streams_equal_those_mixed_by_hand(model, brute):
    found = diagnose(model, single_documents())
    everyone = list(range(NUM_STREAMS))
    equal = torch.ones_like(brute[0].weights), torch.ones_like(brute[1].weights)
    expected = mean_loss(run.mixture_log_probs(everyone, weights) for run, weights in zip(brute, equal))
    assert found.plain_mean_loss == pytest.approx(expected, **EXACT)
    assert [len(step.streams) for step in found.removal] == [4, 3, 2, 1]
    for step in found.removal:
        expected = mean_loss(run.mixture_log_probs(step.streams) for run in brute)
        assert step.loss == pytest.approx(expected, **EXACT)
    averaged = mean_loss(run.own_log_probs().exp().mean(0).log() for run in brute)
    assert found.averaged_prediction_loss == pytest.approx(averaged, **EXACT)


def test_streams_are_switched_off_from_the_smallest_mean_weight_up(model):
    found = diagnose(model, packed_batches())
    by_weight = sorted(range(NUM_STREAMS), key=found.mean_weight.__getitem__)
    assert by_weight != sorted(by_weight)
    assert [step.removed for step in found.removal] == [None, *by_weight[:-1]]
    left = set(range(NUM_STREAMS))
    for step in found.removal:
        left -= {step.removed}
        assert step.streams == sorted(left)
    assert found.removal[0].loss == found.mixture_loss
    assert found.removal[-1].loss == found.own_loss[by_weight[-1]]


def test_weights_are_those_of_the_aggregator_at_the_tokens_with_a_target(model):
    aggregator = find_streams(model).aggregator
    aggregator.record_weights = True
    weights = []
    with torch.no_grad():
        for batch in packed_batches():
            model(**batch)
            weights.append(aggregator.last_weights[:, :-1][batch["labels"][:, 1:] != -100])
    weights = torch.cat(weights).double()
    found = diagnose(model, packed_batches())
    assert found.mean_weight == pytest.approx(weights.mean(0).tolist(), **EXACT)
    winners = torch.bincount(weights.argmax(-1), minlength=NUM_STREAMS) / len(weights)
    assert found.largest_share == pytest.approx(winners.tolist(), **EXACT)
    assert found.entropy == pytest.approx(torch.distributions.Categorical(weights).entropy().mean().item(), **EXACT)
    assert found.entropy_share == pytest.approx(found.entropy / math.log(NUM_STREAMS))


def test_similarity_is_the_mean_cosine_of_hidden_states_after_each_layer(model, brute):
    found = diagnose(model, single_documents())
    assert [layer.layer for layer in found.layers] == ["layers.0", "layers.1", "final"]
    # hidden_states of transformers hold the last layer's states after the final norm only.
    for layer, index in ((found.layers[0], 0), (found.layers[2], 1)):
        for first in range(NUM_STREAMS):
            for second in range(NUM_STREAMS):
                cosine = torch.cat(
                    [torch.cosine_similarity(run.layers[first, index], run.layers[second, index]) for run in brute]
                )
                assert layer.cosine[first][second] == pytest.approx(cosine.mean().item(), abs=1e-5)
        pairs = [layer.cosine[i][j] for i in range(NUM_STREAMS) for j in range(i)]
        assert layer.mean_cosine == pytest.approx(sum(pairs) / len(pairs))
        assert layer.mean_cosine < 0.99


@pytest.mark.parametrize(("model_type", "name"), [("gpt2", "h.0"), ("opt", "layers.1"), ("deepseek_v3", "layers.0")])
def test_layers_are_found_whatever_they_are_called(model_type, name):
    decoder = find_streams(with_streams(tiny_model(model_type))).decoder
    layers = find_layers(decoder)
    assert name in layers
    assert len(layers) == 2


def test_figures_do_not_depend_on_the_size_of_batches_and_of_chunks(model):
    batches = packed_batches(((((5, 4), (9,), (3, 6))),))
    reference = diagnose(model, batches)
    rows = [
        {"input_ids": ids.tolist(), "seq_lengths": sizes}
        for ids, sizes in zip(batches[0]["input_ids"], ([5, 4], [9], [3, 6]))
    ]
    heads = []
    hook = model.get_base_model().lm_head.register_forward_hook(lambda m, args, out: heads.append(out.numel()))
    other = diagnose(model, [PackedCollator(0)([row]) for row in rows], max_logits=3 * VOCABULARY)
    hook.remove()
    assert max(heads) == 3 * VOCABULARY
    assert other.num_tokens == reference.num_tokens
    for name in ("own_loss", "mean_weight", "largest_share", "mixture_loss", "plain_mean_loss", "rho", "entropy"):
        assert getattr(other, name) == pytest.approx(getattr(reference, name), **EXACT)
    for first, second in zip(other.layers, reference.layers):
        assert first.mean_cosine == pytest.approx(second.mean_cosine, abs=1e-5)


def test_every_layer_but_the_head_runs_all_streams_at_once_and_the_head_never_sees_all_tokens(model):
    base, rows = model.get_base_model(), []
    hook = base.model.layers[0].register_forward_pre_hook(lambda module, args: rows.append(tuple(args[0].shape[:2])))
    diagnose(model, packed_batches(), max_logits=VOCABULARY)
    hook.remove()
    assert rows[:2] == [(8, 9), (4, 8)]
    assert set(rows) == {(8, 9), (4, 8), (4, 1)}


def test_rho_of_streams_that_are_all_the_same_is_one(model):
    for name, parameter in model.named_parameters():
        if "parscale_prefix" in name:
            parameter.data.copy_(parameter.data[:1].expand_as(parameter.data))
    found = diagnose(model, packed_batches())
    assert found.rho == pytest.approx(1, abs=1e-6)
    assert torch.tensor(found.pairwise_rho).sub(1).abs().max() < 1e-6
    assert found.own_loss == pytest.approx([found.mixture_loss] * NUM_STREAMS, abs=1e-5)
    assert all(layer.mean_cosine == pytest.approx(1, abs=1e-5) for layer in found.layers)


def test_rho_of_pairs_is_that_of_their_own_and_averaged_losses(model, brute):
    found = diagnose(model, single_documents(), irreducible_loss=1.5)
    for i in range(NUM_STREAMS):
        for j in range(NUM_STREAMS):
            average = mean_loss(run.own_log_probs()[[i, j]].exp().mean(0).log() for run in brute)
            own = (found.own_loss[i] + found.own_loss[j]) / 2
            assert found.pairwise_rho[i][j] == pytest.approx(2 * (average - 1.5) / (own - 1.5) - 1, abs=1e-5)
        assert found.pairwise_rho[i][i] == pytest.approx(1)
    assert found.rho < diagnose(model, single_documents()).rho < 1


@pytest.mark.parametrize("rho", [-0.2, 0.0, 0.4, 0.9, 1.0])
def test_rho_is_recovered_from_residuals_of_which_it_is_known(rho):
    """Relative residuals of a given correlation around a known truth; losses exact, no sampling of tokens."""
    generator = torch.Generator().manual_seed(0)
    num_streams, num_contexts, vocabulary, size = 4, 4000, 20, 0.05
    truth = torch.softmax(torch.randn(num_contexts, vocabulary, generator=generator, dtype=torch.double), -1)
    covariance = torch.full((num_streams, num_streams), rho, dtype=torch.double).fill_diagonal_(1)
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt()
    noise = torch.randn(num_contexts, vocabulary, num_streams, generator=generator, dtype=torch.double) @ root.T
    residuals = size * (noise - (truth[..., None] * noise).sum(1, keepdim=True))  # E[residual] = 0, so sums stay 1
    predictions = truth[..., None] * (1 + residuals)
    entropy = -(truth * truth.log()).sum(1).mean().item()
    own = -(truth[..., None] * predictions.log()).sum(1).mean().item()
    averaged = -(truth * predictions.mean(-1).log()).sum(1).mean().item()
    assert residual_correlation(own, averaged, num_streams, entropy) == pytest.approx(rho, abs=0.01)


def test_rho_is_the_one_of_the_diversity_law():
    law = DiversityLaw(A=1.2e7, alpha=0.2, E=0.7, rho=0.85)
    for num_streams in (2, 4, 8):
        losses = float(law.loss(1e9, 1)), float(law.loss(1e9, num_streams))
        assert residual_correlation(*losses, num_streams, 0.7) == pytest.approx(0.85)


def test_dropout_is_off_while_measuring():
    model = sharp(with_streams(tiny_model(attention_dropout=0.5), NUM_STREAMS))
    expected = diagnose(model, packed_batches())
    assert diagnose(model.train(), packed_batches()) == expected


def test_the_model_is_left_as_it_was(model):
    model.train()
    streams = find_streams(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    diagnose(model, packed_batches())
    assert all(module.training for module in model.modules())
    assert hooks == {name: len(module._forward_hooks) for name, module in model.named_modules()}
    assert (streams.aggregator.record_weights, streams.aggregator.last_weights) == (False, None)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_ties_for_the_largest_weight_are_divided():
    weights = torch.tensor([[[0.25, 0.25, 0.5], [0.4, 0.4, 0.2]]])
    sums = weight_sums(weights[0])
    assert sums.largest.tolist() == [0.5, 0.5, 1]
    assert (sums + sums).largest.tolist() == [1, 1, 2]
    assert weight_sums(torch.tensor([[1.0, 0.0]])).entropy == 0


def test_stream_statistics_leave_hidden_tokens_out():
    weights = torch.tensor([[[0.9, 0.1], [0.3, 0.7]], [[0.6, 0.4], [0.5, 0.5]]])
    found = stream_statistics(weights, torch.tensor([[1, 0], [1, 0]]))
    assert found["stream_weight/0"] == pytest.approx(0.75)
    assert found["stream_largest/0"] == 1
    whole = stream_statistics(weights)
    assert whole["stream_weight/0"] == pytest.approx(0.575)
    assert whole["stream_largest/1"] == pytest.approx(1.5 / 4)
    assert set(found) == {"stream_entropy", *(f"stream_{name}/{p}" for name in ("weight", "largest") for p in (0, 1))}


def without_targets():
    batch = packed_batches()[0]
    return [{**batch, "labels": torch.full_like(batch["labels"], -100)}]


def test_what_has_no_streams_to_compare_is_refused(model):
    lora = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="not a ParScale adapter"):
        diagnose(lora, packed_batches())
    with pytest.raises(ValueError, match="has one stream"):
        diagnose(with_streams(tiny_model(), 1), packed_batches())
    with pytest.raises(TypeError, match="must be a PeftModel"):
        diagnose(tiny_model(), packed_batches())
    with model.disable_adapter(), pytest.raises(ValueError, match="is disabled"):
        diagnose(model, packed_batches())


def test_bad_data_and_bad_bounds_are_refused(model):
    with pytest.raises(ValueError, match="no token of the data has a target"):
        diagnose(model, without_targets())
    with pytest.raises(ValueError, match="no token of the data has a target"):
        diagnose(model, [])
    with pytest.raises(ValueError, match="can be gone through twice"):
        diagnose(model, iter(packed_batches()))
    with pytest.raises(ValueError, match="must be a loss of at least 0, got -1"):
        diagnose(model, packed_batches(), irreducible_loss=-1)
    with pytest.raises(ValueError, match="must lie below every loss of the streams, got 50"):
        diagnose(model, packed_batches(), irreducible_loss=50)


@pytest.mark.parametrize("num_streams", [2, 8])
def test_the_page_of_pictures_names_its_axes(num_streams):
    found = diagnose(with_streams(tiny_model(), num_streams), packed_batches())
    axes = [axes for axes in plot_diagnostics(found, "tiny").axes if axes.get_xlabel()]
    assert [axes.get_xlabel() for axes in axes] == [
        "stream",
        "stream",
        "stream",
        "layer (last: after the final norm)",
        "streams left",
    ]
    assert all(axes.get_ylabel() and axes.get_title() for axes in axes)


def test_a_second_adapter_is_measured_when_it_is_active(model):
    from parscale_adapt import ParScaleConfig

    model.add_adapter("other", ParScaleConfig(task_type="CAUSAL_LM", num_streams=2, num_prefix_tokens=3, init_std=0.5))
    model.set_adapter("other")
    model.eval()
    found = diagnose(model, packed_batches())
    assert found.num_streams == 2
    assert len(found.removal) == 2
    with torch.no_grad():
        assert found.mixture_loss == pytest.approx(own_loss(model, packed_batches()), **EXACT)
    assert sum(isinstance(module, Aggregator) for module in model.modules()) == 2
