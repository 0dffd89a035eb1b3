"""`--torch_compile true`: layers are traced as a whole, forward and in the steps of a trainer."""

import pytest
import torch
from datasets import Dataset
from support.tiny_models import random_tokens, tiny_model, with_streams
from support.trainers import trainer_of
from torch._dynamo.backends import registry
from torch._dynamo.backends.registry import lookup_backend


pytestmark = pytest.mark.slow

NUM_LAYERS = 3
ATTENTIONS = ("softmax", "scaled_dot_product_attention")


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are compiled, each as the names of what it calls."""
    traced = []

    def names(module):
        for node in module.graph.nodes:
            yield getattr(node.target, "__name__", str(node.target))
        for child in module.children():  # the bodies of checkpointed layers
            if isinstance(child, torch.fx.GraphModule):
                yield from names(child)

    def backend(module, inputs):
        traced.append(list(names(module)))
        return module.forward

    torch._dynamo.reset()
    lookup_backend("eager")  # which loads it
    monkeypatch.setitem(registry._COMPILER_FNS, "eager", backend)  # accelerate takes no name of ours
    yield traced
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "lengths",
    [(3, 12, 5, 9, 4, 13, 7, 6), (40,) * 8, (40, 64, 51, 33, 64, 48, 39, 57)],
    ids=["short rows: scores joined", "whole rows: causal flag", "long rows: prefix before keys"],
)
@pytest.mark.parametrize(
    ("fields", "checkpoints"),
    [({"stream_transform": ["prefix", "lora"]}, False), ({"train_backbone": True}, True)],
    ids=["frozen", "full, checkpointed"],
)
def test_a_step_has_no_graph_break_inside_its_layers(graphs, tmp_path, fields, checkpoints, lengths):
    rows = Dataset.from_list([{"input_ids": random_tokens(1, n, seed=n)[0].tolist()} for n in lengths])
    losses = []
    for compiles in (False, True):
        model = with_streams(tiny_model(num_hidden_layers=NUM_LAYERS), 3, **fields)
        options = {"torch_compile": True, "torch_compile_backend": "eager"} if compiles else {}
        trainer = trainer_of(model, tmp_path, max_steps=2, gradient_checkpointing=checkpoints, **options)
        trainer.train_dataset = rows
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    # A break inside a layer would tear its attention or its MLP away from the others. The aggregator has one more of each.
    found = [(sum(map(graph.count, ATTENTIONS)), graph.count("silu")) for graph in graphs]
    assert {counts for counts in found if any(counts)} == {(NUM_LAYERS + 1, NUM_LAYERS + 1)}, found
