"""Low-rank weights and biases per stream on sharded engines, as in `test_engines_launched.py`."""

import pytest
from support.engine_runs import TWO_PROCESSES, assert_agree, assert_saved, runs_of


pytestmark = pytest.mark.slow

RUNS = {
    "lora": {"stream_transform": "lora", "aggregator": "static", "gradient_checkpointing": True},
    "bitfit": {"stream_transform": "bitfit", "train_backbone": True},
    "together": {"stream_transform": ["prefix", "lora"], "num_prefix_tokens": 4, "gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def alone(recipes, material):
    """The runs in one process."""
    options = {name: material.cpt_options(**{"num_prefix_tokens": None, **changes}) for name, changes in RUNS.items()}
    return {name: recipes.run("cpt", **each).check() for name, each in options.items()}


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_a_sharded_engine_trains_as_one_process(material, alone, tmp_path, engine):
    if engine == "zero3":
        pytest.importorskip("deepspeed")
    options = material.cpt_options(num_prefix_tokens=None, fsdp_on_cpu=engine == "fsdp2", **TWO_PROCESSES)
    results = runs_of(engine, tmp_path, {name: ("cpt", {**options, **changes}) for name, changes in RUNS.items()})
    for name in RUNS:
        result = results[name][0].check()
        assert any(kind.startswith(("ZeRO-3", "DTensor")) for kind in result.batches()[0]["kinds"]), "not sharded"
        assert_agree(result, alone[name])
        assert_saved(result)
