"""Streams in chunks under an engine on two processes, against one process that runs all streams at once."""

import pytest
from support.engine_runs import TWO_PROCESSES, assert_agree, assert_saved, runs_of


pytestmark = pytest.mark.slow

CHECKPOINTED = {"gradient_checkpointing": True}
RUNS = {
    "frozen": CHECKPOINTED,
    "full": {"train_backbone": True, **CHECKPOINTED},
    "plain layers": {"train_backbone": True},
    "together": {"stream_transform": ["prefix", "lora"], **CHECKPOINTED},
}


def stage(number):
    return {"environment": {"ACCELERATE_DEEPSPEED_ZERO_STAGE": number}}


ENGINES = {
    "zero3": {**{name: (name, {}) for name in RUNS}, "zero1": ("full", stage("1")), "zero2": ("full", stage("2"))},
    "fsdp2": {name: (name, {}) for name in RUNS},
    "ddp": {name: (name, {}) for name in ("frozen", "full")},
}


@pytest.fixture(scope="module")
def alone(recipes, material):
    """The runs in one process, all streams at once."""
    return {
        name: recipes.run("cpt", **material.cpt_options(num_streams=3, **changes)).check()
        for name, changes in RUNS.items()
    }


def gradient_norms(result):
    """Of each step; Adam's steps would not show gradients that are too large altogether."""
    return [entry["grad_norm"] for entry in result.metrics["log_history"] if "loss" in entry]


@pytest.mark.parametrize("engine", ENGINES)
def test_chunks_under_an_engine_train_as_all_streams_in_one_process(material, alone, tmp_path, engine):
    if engine == "zero3":
        pytest.importorskip("deepspeed")
    options = material.cpt_options(num_streams=3, fsdp_on_cpu=engine == "fsdp2", **TWO_PROCESSES)
    described = {
        name: ("cpt", {**options, **RUNS[run], **changes, "stream_chunk_size": 1})
        for name, (run, changes) in ENGINES[engine].items()
    }
    results = runs_of(engine, tmp_path, described)
    for name, (run, _) in ENGINES[engine].items():
        result = results[name][0].check()
        assert_agree(result, alone[run])
        assert gradient_norms(result) == pytest.approx(gradient_norms(alone[run]), rel=1e-4)
        assert_saved(result)
