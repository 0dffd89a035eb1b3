"""The log of a run in its folder: what the trainer logs, line by line, and what resuming keeps of it."""

import json
import time

from transformers import TrainerControl, TrainerState, TrainingArguments

from parscale_adapt.training.run_log import LOG_FILE, RunLogCallback


def lines(folder):
    return [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]


class Trainer:
    """Just what calls the callback."""

    def __init__(self, folder, step=0, is_main=True):
        self.callback = RunLogCallback()
        self.arguments = TrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True)
        self.state = TrainerState(global_step=step, is_world_process_zero=is_main)
        self.callback.on_train_begin(self.arguments, self.state, TrainerControl())

    def log(self, **figures):
        self.state.global_step += 1
        self.state.log_history.append({**figures, "step": self.state.global_step})
        self.callback.on_log(self.arguments, self.state, TrainerControl(), logs=figures)


def test_the_recipes_write_what_they_log(recipes, material):
    began = time.time()
    result = recipes.run("cpt", **material.cpt_options(eval_strategy="steps", eval_steps=2)).check()
    first, *entries = lines(result.output_dir)
    assert first["step"] == first["num_input_tokens_seen"] == 0
    times = [entry.pop("time") for entry in (first, *entries)]
    assert began < times[0] <= times[-1] < time.time()
    assert times == sorted(times)
    assert entries == result.metrics["log_history"]
    trained = [entry for entry in entries if "loss" in entry]
    assert [entry["num_input_tokens_seen"] for entry in trained] == [256, 512, 768, 1024]
    assert all("stream_weight/1" in entry for entry in trained)


def test_resuming_keeps_what_was_logged_up_to_its_checkpoint(tmp_path):
    trainer = Trainer(tmp_path)
    for loss in (3.0, 2.0, 1.0):
        trainer.log(loss=loss)
    with (tmp_path / LOG_FILE).open("a") as file:
        file.write('{"step": 4, "lo')  # killed amid a line
    resumed = Trainer(tmp_path, step=2)
    resumed.log(loss=0.5)
    assert [(line["step"], line.get("loss")) for line in lines(tmp_path)] == [
        (0, None),
        (1, 3.0),
        (2, 2.0),
        (2, None),
        (3, 0.5),
    ]
    Trainer(tmp_path).log(loss=9.0)
    assert [line.get("loss") for line in lines(tmp_path)] == [None, 9.0]


def test_one_process_of_several_writes(tmp_path):
    Trainer(tmp_path, is_main=False).log(loss=1.0)
    assert not (tmp_path / LOG_FILE).exists()


def test_a_log_that_can_not_be_written_is_said_once_and_stops_nothing(tmp_path, capsys):
    (tmp_path / LOG_FILE).mkdir()
    trainer = Trainer(tmp_path)
    trainer.log(loss=1.0)
    trainer.log(loss=2.0)
    message = capsys.readouterr().err
    assert message.count("can't be written") == 1
    assert "this run can't be watched" in message
