"""A checkpoint is resumed with all of its states, or refused by name; a new optimizer only where it is asked for."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from support.tiny_models import tiny_model, with_streams
from support.trainers import rows_of_uneven_lengths, word_tokenizer
from torch.distributed.fsdp import StateDictType

from parscale_adapt.training import StreamConfig, StreamTrainer
from parscale_adapt.training.resuming import check_states, expected_states
from parscale_adapt.training.saving import record_verified


def stream_trainer(folder, init_weights="normal", **options):
    settings = {"per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 0.1, "logging_steps": 1}
    settings |= {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "max_length": None}
    settings |= {"save_strategy": "steps", "save_steps": 1, "warmup_steps": 1, "gradient_checkpointing": False}
    rows = rows_of_uneven_lengths()
    return StreamTrainer(
        with_streams(tiny_model(), init_weights=init_weights),
        StreamConfig(output_dir=str(folder), **{**settings, **options}),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=word_tokenizer(),
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    trainer = stream_trainer(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer


@pytest.fixture
def checkpoint(whole, tmp_path):
    """That of step 2, to be damaged."""
    return shutil.copytree(f"{whole.args.output_dir}/checkpoint-2", tmp_path / "run" / "checkpoint-2")


def history(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if "loss" in entry]


STATES = ["optimizer.pt", "scheduler.pt", "rng_state.pth"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def cut_to_nothing(path):
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("name", "is_recorded"),
    [*((name, is_recorded) for name in STATES for is_recorded in (True, False)), ("adapter_model.safetensors", True)],
)
@pytest.mark.parametrize("damage", [lambda path: path.unlink(), cut, cut_to_nothing], ids=["lost", "cut", "empty"])
def test_a_state_that_is_lost_or_cut_is_named(checkpoint, name, damage, is_recorded):
    if not is_recorded:
        (checkpoint / "verified_save.json").write_text('{"num_tensors": 8}')
    damage(checkpoint / name)
    trainer = stream_trainer(checkpoint.parent)
    with pytest.raises(ValueError, match=f"checkpoint-2 can't be resumed as it was: .*{name}") as raised:
        trainer.train(resume_from_checkpoint=True)
    assert "`--restart_optimizer true`" in str(raised.value)
    assert not trainer.has_begun


@pytest.mark.parametrize("content", [None, "", "{}"])
@pytest.mark.parametrize("restart", [False, True])
def test_without_its_step_a_checkpoint_is_no_place_to_go_on_from(checkpoint, content, restart):
    path = checkpoint / "trainer_state.json"
    path.unlink() if content is None else path.write_text(content)
    what = "is missing" if content is None else "is damaged"
    with pytest.raises(
        ValueError, match=f"trainer_state.json, which tells its step, {what}; .*--adapter_name_or_path"
    ):
        stream_trainer(checkpoint.parent, restart_optimizer=restart).train(resume_from_checkpoint=True)


def test_a_whole_checkpoint_goes_on_as_if_nothing_had_happened(checkpoint, whole):
    trainer = stream_trainer(checkpoint.parent)
    trainer.train(resume_from_checkpoint=True)
    assert history(trainer, "loss") == history(whole, "loss")


@pytest.mark.parametrize("init_weights", ["normal", "reparameterized"])
def test_a_new_optimizer_goes_on_from_the_weights_and_the_step(tmp_path, init_weights, capsys):
    options = {"init_weights": init_weights, "save_only_model": True}
    first = stream_trainer(tmp_path / "run", **options)
    first.train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    with pytest.raises(ValueError, match=r"it has no optimizer\.pt, the optimizer's state"):
        stream_trainer(tmp_path / "run", **options).train(resume_from_checkpoint=True)
    second = stream_trainer(tmp_path / "run", restart_optimizer=True, **options)
    capsys.readouterr()
    second.train(resume_from_checkpoint=True)
    assert "at step 2: the optimizer, the loss scale and the random numbers start anew" in capsys.readouterr().out
    assert second.state.global_step == 4
    assert history(second, "loss")[:3] == history(first, "loss")[:3]  # the third is that of the weights of step 2
    assert history(second, "learning_rate") == history(first, "learning_rate")
    assert history(second, "loss")[3] != history(first, "loss")[3]


def test_a_restart_leaves_the_states_of_a_whole_checkpoint_unread(checkpoint, whole):
    trainer = stream_trainer(checkpoint.parent, restart_optimizer=True)
    trainer.train(resume_from_checkpoint=True)
    assert history(trainer, "loss")[3] != history(whole, "loss")[3]
    step = load_adam_step(trainer)
    assert step == 2


def load_adam_step(trainer):
    (step, *_) = [state["step"].item() for state in trainer.optimizer.state_dict()["state"].values()]
    return step


def test_a_restart_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`restart_optimizer` has no effect without `--resume_from_checkpoint`"):
        stream_trainer(tmp_path, restart_optimizer=True).train()


@pytest.mark.parametrize("init_weights", ["normal", "reparameterized"])
def test_the_best_model_is_loaded_at_the_end(tmp_path, init_weights):
    trainer = stream_trainer(
        tmp_path,
        init_weights,
        max_steps=3,
        greater_is_better=True,  # so that it is not the last one
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    measured = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best = max(measured, key=measured.get)
    assert best < 3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(measured[best], abs=1e-5)
    trainer.save_model(str(tmp_path / "final"))
    expected = load_file(tmp_path / f"checkpoint-{best}" / "adapter_model.safetensors")
    found = load_file(tmp_path / "final" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def engine(kind, **state):
    """A trainer as far as its states are concerned."""
    accelerator = SimpleNamespace(distributed_type=kind, state=SimpleNamespace(**state), scaler=None)
    return SimpleNamespace(args=SimpleNamespace(world_size=2), accelerator=accelerator)


def deepspeed(stage, config=()):
    return engine(
        DistributedType.DEEPSPEED, deepspeed_plugin=SimpleNamespace(zero_stage=stage, deepspeed_config=dict(config))
    )


def fsdp(kind):
    return engine(DistributedType.FSDP, fsdp_plugin=SimpleNamespace(state_dict_type=kind))


RANDOM = ["rng_state_0.pth", "rng_state_1.pth"]
LAYOUTS = {
    "zero3": (
        deepspeed(3),
        [
            f"global_step2/zero_pp_rank_{rank}_mp_rank_00_{what}_states.pt"
            for rank in (0, 1)
            for what in ("optim", "model")
        ],
        ["scheduler.pt"],
    ),
    "zero2, its own schedule": (
        deepspeed(2, {"scheduler": {}}),
        [*(f"global_step2/bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1))],
        ["global_step2/mp_rank_00_model_states.pt"],
    ),
    "fsdp, shards": (
        fsdp(StateDictType.SHARDED_STATE_DICT),
        [
            f"{folder}/{name}"
            for folder in ("optimizer_0", "pytorch_model_fsdp_0")
            for name in (".metadata", "__0_0.distcp")
        ],
        ["scheduler.pt"],
    ),
    "fsdp, whole": (
        fsdp(StateDictType.FULL_STATE_DICT),
        ["optimizer.bin", "pytorch_model_fsdp.bin"],
        ["scheduler.pt"],
    ),
}


@pytest.mark.parametrize(("trainer", "files", "more"), LAYOUTS.values(), ids=LAYOUTS)
def test_every_file_of_an_engine_is_missed_and_its_length_known(tmp_path, trainer, files, more):
    names = [*files, *more, *RANDOM]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if name.endswith((".pt", ".pth", ".bin")):
            torch.save({"a": torch.ones(3)}, path)
        else:
            path.write_bytes(b"content")
    record_verified(tmp_path, 1)
    expected = expected_states(trainer)
    check_states(str(tmp_path), expected)
    for name in names:
        path = tmp_path / name
        content = path.read_bytes()
        for damaged in (None, content[:-1]):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with pytest.raises(ValueError, match="can't be resumed as it was: ") as raised:
                check_states(str(tmp_path), expected)
            kind = "optim_states" if "optim_states" in name else "model_states" if "model_states" in name else name
            assert kind in str(raised.value)
        path.write_bytes(content)
    record = json.loads((tmp_path / "verified_save.json").read_text())
    assert record["files"].keys() == set(names)


def test_a_loss_scale_is_expected_where_there_is_one():
    trainer = engine(DistributedType.NO)
    patterns = {state.pattern for state in expected_states(trainer)}
    trainer.accelerator.scaler = object()
    assert {state.pattern for state in expected_states(trainer)} - patterns == {"scaler.pt"}
