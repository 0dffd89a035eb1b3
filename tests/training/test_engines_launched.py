"""`accelerate launch` on two processes: every engine trains as one process does on the same global batch, and saves
what it trained.

All runs of an engine share one launch, since importing the libraries takes longer than a run.
"""

import pytest
import torch
from support.engine_runs import TWO_PROCESSES, assert_agree, assert_saved, runs_of
from support.recipe_runs import REPOSITORY, Result, command_line, launch, reloaded_logits


pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("engines")]  # one launch for all runs of an engine

SAVES = {"save_strategy": "steps", "save_steps": 2}
LAST_SAVE = 2
FULL = {"train_backbone": True, "gradient_checkpointing": True}
RATES = {
    "train_backbone": True,
    "learning_rate": 1e-4,
    "prefix_learning_rate": 1e-2,
    "aggregator_learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "diversity_weight": 1.0,  # of each process's own batch, which in one process is a micro-batch
}
HALF = {"dtype": "bfloat16", "train_backbone": True}


def spoiled(folder, options):
    """A run that meets a gradient that is no number, one without states, and what is made of its checkpoint."""
    lean = {**options, **SAVES, "save_only_model": True, "output_dir": folder / "lean"}
    again = {**lean, "resume_from_checkpoint": True}
    return {
        "spoiled": ("cpt", {**options, **SAVES, "spoil_gradient_at": 3}),
        "lean": ("cpt", {**lean, "max_steps": 2}),
        "model_only": ("cpt", {**again, "max_steps": 2}),
        "restarted": ("cpt", {**again, "max_steps": 2, "restart_optimizer": True}),
    }


def resumed(name, folder, options):
    """A run, and one that goes on from the middle of it."""
    checkpoint = folder / name / f"checkpoint-{LAST_SAVE}"
    return {
        name: ("cpt", {**options}),
        f"{name}_resumed": ("cpt", {**options, "resume_from_checkpoint": checkpoint}),
    }


@pytest.fixture(scope="module")
def zero3(material, tmp_path_factory):
    """Runs under DeepSpeed ZeRO-3, by name, as a list over ranks."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("zero3")
    options = material.cpt_options(**TWO_PROCESSES)
    sft = material.sft_options(
        adapter_name_or_path=folder / "full", heldout_dataset=material.questions, **TWO_PROCESSES
    )
    runs = {
        **resumed("frozen", folder, {**options, **SAVES}),
        **resumed("full", folder, {**options, **SAVES, **FULL}),
        "tokens": ("cpt", {**options, "init_weights": "tokens", "gradient_checkpointing": True}),
        "near_identity": ("cpt", {**options, "init_weights": "near_identity"}),
        "reparameterized": ("cpt", {**options, "init_weights": "reparameterized"}),
        "sft": ("sft", {**sft, "num_streams": None, "num_prefix_tokens": None}),
        "shards": ("cpt", {**options, **SAVES, "save_shards": True}),
        **spoiled(folder, options),
        "zero2": ("cpt", {**options, "environment": {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "train_backbone": True}),
    }
    for stage in "123":
        rates = {**options, **SAVES, **RATES, "environment": {"ACCELERATE_DEEPSPEED_ZERO_STAGE": stage}}
        runs |= resumed(f"rates{stage}", folder, rates)
    return runs_of("zero3", folder, runs)


@pytest.fixture(scope="module")
def fsdp2(material, tmp_path_factory):
    """Runs under FSDP2, by name, as a list over ranks."""
    folder = tmp_path_factory.mktemp("fsdp2")
    options = material.cpt_options(fsdp_on_cpu=True, **TWO_PROCESSES)
    runs = {
        "frozen": ("cpt", {**options, "gradient_checkpointing": True}),
        **resumed("full", folder, {**options, **SAVES, **FULL}),
        **resumed("rates", folder, {**options, **SAVES, **RATES}),
        "tokens": ("cpt", {**options, "init_weights": "tokens"}),
        "near_identity": ("cpt", {**options, "init_weights": "near_identity"}),
        "shards": ("cpt", {**options, **SAVES, "save_shards": True}),
        **spoiled(folder, options),
        "mixed": ("cpt", {**options, **HALF, "bf16": True}),
        "half": ("cpt", {**options, **HALF}),
    }
    return runs_of("fsdp2", folder, runs)


@pytest.fixture(scope="module")
def alone(recipes, material):
    """The same runs in one process, whose batch is the global batch."""
    cpt = {"frozen": {}, "full": {"train_backbone": True}, "tokens": {"init_weights": "tokens"}}
    cpt["rates"] = {**RATES, **TWO_PROCESSES, "gradient_accumulation_steps": 2}
    cpt["near_identity"] = {"init_weights": "near_identity"}
    cpt["reparameterized"] = {"init_weights": "reparameterized"}
    return {name: recipes.run("cpt", **material.cpt_options(**changes)).check() for name, changes in cpt.items()}


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_a_gradient_that_is_no_number_stops_every_engine(engine, request):
    for rank, result in enumerate(request.getfixturevalue(engine)["spoiled"]):
        assert result.exit_code == 1
        (sentence,) = result.errors(rank)
        assert "stopped after step 3 by NonFiniteError: the gradient of" in sentence
        assert "is not finite in step 4" in sentence
        assert f"the last verified checkpoint is {result.output_dir}/checkpoint-2" in sentence
        assert not (result.output_dir / "checkpoint-4").exists()
        if engine == "fsdp2":
            assert "the gradient of base_model.model." in sentence


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_an_engine_s_checkpoint_without_its_optimizer_is_refused(engine, request):
    for kind, sentence in (
        ("model_only", "can't be resumed as it was: it has no"),
        ("restarted", "can't go on under"),
    ):
        for rank, result in enumerate(request.getfixturevalue(engine)[kind]):
            assert result.exit_code == 1
            (error,) = result.errors(rank)
            assert sentence in error
            assert result.batches(rank) == []


def batches_of(result, rank):
    return [(batch["step"], batch["ids"], batch["loss"]) for batch in result.batches(rank)]


def assert_streams_are_logged(result):
    for entry in result.metrics["log_history"]:
        if "loss" in entry:
            assert sum(entry[f"stream_weight/{stream}"] for stream in range(2)) == pytest.approx(1, abs=1e-5)


def assert_resumed_exactly(runs, name):
    whole, later = runs[name], runs[f"{name}_resumed"]
    for rank in range(2):
        assert batches_of(later[rank].check(), rank) == batches_of(whole[rank], rank)[LAST_SAVE:]
    assert later[0].losses == whole[0].losses
    assert all(torch.equal(later[0].tensors[key], tensor) for key, tensor in whole[0].tensors.items())


@pytest.mark.parametrize("name", ["frozen", "full", "tokens", "near_identity", "reparameterized"])
def test_zero3_trains_as_one_process(zero3, alone, name):
    result = zero3[name][0].check()
    kinds = ["ZeRO-3 float32"] if name == "full" else ["ZeRO-3", "ZeRO-3 float32"]
    assert result.batches()[0]["kinds"] == kinds, "not partitioned"
    assert result.metrics["num_params"] == alone[name].metrics["num_params"]
    assert_agree(result, alone[name])
    assert_saved(result)
    assert_streams_are_logged(result)


@pytest.mark.parametrize("name", ["frozen", "full"])
def test_zero3_resumes_exactly(zero3, name):
    assert_resumed_exactly(zero3, name)


def test_zero3_tunes_what_it_pretrained(zero3, recipes, material):
    result = zero3["sft"][0].check()
    options = material.sft_options(
        adapter_name_or_path=zero3["full"][0].output_dir,
        heldout_dataset=material.questions,
        num_streams=None,
        num_prefix_tokens=None,
    )
    assert_agree(result, recipes.run("sft", **options).check())
    assert_saved(result)
    before = zero3["full"][0].tensors
    assert all(torch.equal(result.tensors[name], before[name]) == ("parscale_" not in name) for name in before)


def test_zero2_trains_as_one_process(zero3, alone):
    result = zero3["zero2"][0].check()
    assert_agree(result, alone["full"])
    assert_saved(result)


@pytest.mark.parametrize("name", ["frozen", "full", "tokens", "near_identity"])
def test_fsdp2_trains_as_one_process(fsdp2, alone, name):
    result = fsdp2[name][0].check()
    kinds = ["DTensor float32"] if name == "full" else ["DTensor", "DTensor float32"]
    assert result.batches()[0]["kinds"] == kinds, "not sharded"
    assert_agree(result, alone[name])
    assert_saved(result)
    assert_streams_are_logged(result)


def test_fsdp2_resumes_exactly(fsdp2):
    assert_resumed_exactly(fsdp2, "full")


def test_fsdp2_trains_one_type_over_a_bfloat16_backbone(fsdp2):
    result = fsdp2["mixed"][0].check()
    assert result.batches()[0]["kinds"] == ["DTensor float32"]
    assert {tensor.dtype for tensor in result.tensors.values()} == {torch.float32}


def test_fsdp2_refuses_to_train_several_types(fsdp2):
    for rank, result in enumerate(fsdp2["half"]):
        assert result.exit_code == 1
        (sentence,) = result.errors(rank)
        assert "trained parameters of several types (torch.bfloat16, torch.float32)" in sentence


def assert_as_diverse(result, reference):
    """What each step's log says of the correlation between streams."""
    found, wanted = (
        [entry["stream_decorrelation"] for entry in each.metrics["log_history"] if "loss" in entry]
        for each in (result, reference)
    )
    assert found == pytest.approx(wanted, abs=1e-5)
    assert min(found) > 0.01


def rates_of(result):
    """What each step's log says of the rates of the parts."""
    steps = [entry for entry in result.metrics["log_history"] if "loss" in entry]
    return [{name: entry[name] for name in entry if name.startswith("learning_rate/")} for entry in steps]


@pytest.mark.parametrize(("engine", "name"), [*(("zero3", f"rates{stage}") for stage in "123"), ("fsdp2", "rates")])
def test_every_part_keeps_its_rate_in_an_engine_and_over_a_resume(engine, name, alone, request):
    runs = request.getfixturevalue(engine)
    result = runs[name][0].check()
    assert_agree(result, alone["rates"])
    assert_as_diverse(result, alone["rates"])
    assert rates_of(result) == rates_of(alone["rates"])
    for step, rates in enumerate(rates_of(result)):
        shares = {part: rate * (1 - step / 4) for part, rate in (("prefix", 1e-2), ("aggregator", 1e-3))}
        expected = {**shares, "backbone": 1e-4 * (1 - step / 4)}
        assert rates == pytest.approx({f"learning_rate/{part}": rate for part, rate in expected.items()})
    assert_resumed_exactly(runs, name)
    assert rates_of(runs[f"{name}_resumed"][0]) == rates_of(result)


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_shards_are_never_saved_as_an_adapter(engine, request):
    result = request.getfixturevalue(engine)["shards"][0]
    assert result.exit_code == 1
    (sentence,) = result.errors()
    assert ("only a shard" if engine == "fsdp2" else "(0,) instead of (2, 2, 4, 8)") in sentence
    assert not list(result.output_dir.rglob("adapter_model*"))


def test_ddp_trains_as_one_process(material, alone, tmp_path):
    options = material.cpt_options(**RATES, **TWO_PROCESSES)
    script = str(REPOSITORY / "recipes" / "cpt.py")
    launch("ddp", tmp_path / "launch", script, command_line({"output_dir": tmp_path / "run", **options}))
    result = Result(0, tmp_path / "run", tmp_path)
    assert_agree(result, alone["rates"])
    assert_as_diverse(result, alone["rates"])
    assert rates_of(result) == rates_of(alone["rates"])
    assert_streams_are_logged(result)
    assert torch.isfinite(reloaded_logits(result.output_dir)).all()
