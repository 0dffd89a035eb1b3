"""What a run writes about itself."""

from pathlib import Path

import pytest
import yaml

from parscale_adapt.terminal import console
from parscale_adapt.training.plots import plot_curve
from parscale_adapt.training.report import environment, results_table, write_card


METRICS = {
    "streams": {
        "num_streams": 2,
        "stream_transform": ["prefix", "lora"],
        "num_prefix_tokens": 4,
        "train_backbone": False,
    },
    "run": {"backbone": "Qwen/Qwen2.5-3B", "data": ["a.jsonl", "b.jsonl"], "seed": 0},
    "loss": "loss (nats per token)",
    "curve": "loss",
    "heldout": {},
    "num_adapter_params": 12345,
    "num_tokens": 67890,
    "environment": {"torch": "2.13"},
}


@pytest.mark.parametrize(("loss", "shown"), [(1.23456, "1.2346 nats per token"), (None, "not measured")])
def test_the_card_states_the_run(tmp_path, loss, shown):
    path = tmp_path / "README.md"
    write_card({**METRICS, "heldout_loss": loss}, "my-run", path)
    _, header, body = path.read_text().split("---\n", 2)
    assert yaml.safe_load(header)["base_model"] == "Qwen/Qwen2.5-3B"
    assert yaml.safe_load(header)["library_name"] == "peft"
    for text in ("# my-run", "frozen", "12,345", "67,890", "a.jsonl, b.jsonl", "torch 2.13", shown):
        assert text in body
    assert "| streams differ by | prefix and lora |\n| prefix tokens per stream | 4 |\n" in body


def test_the_card_of_a_reward_model_loads_one(tmp_path):
    pairs = {"loss": "reward loss (nats per pair)", "heldout": {"accuracy": 0.9375}, "heldout_loss": 0.25}
    path = tmp_path / "README.md"
    write_card({**METRICS, **pairs}, "judge", path, "AutoPeftModelForSequenceClassification", "text-classification")
    text = path.read_text()
    for part in (
        "pipeline_tag: text-classification",
        "| held-out loss | 0.2500 nats per pair |\n| held-out accuracy | 0.9375 |",
        "model = AutoPeftModelForSequenceClassification.from_pretrained(",
    ):
        assert part in text


def test_the_card_names_prefix_tokens_where_there_are_some(tmp_path):
    streams = {**METRICS["streams"], "stream_transform": "lora"}
    write_card({**METRICS, "streams": streams, "heldout_loss": None}, "my-run", tmp_path / "README.md")
    body = (tmp_path / "README.md").read_text()
    assert "| streams differ by | lora |" in body
    assert "prefix tokens" not in body


def test_a_run_ends_with_the_figures_of_its_card(capsys):
    metrics = {**METRICS, "heldout": {"accuracy": 0.9375}, "heldout_loss": 1.23456}
    console().print(results_table(metrics, Path("runs") / "[mine]"))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in (
        "backbone Qwen/Qwen2.5-3B, frozen",
        "held-out loss 1.2346 nats per token",
        "held-out accuracy 0.9375",
        "saved in runs/[mine]",
        "curve and figures loss_curve.png and metrics.json in it",
    ):
        assert line in lines


@pytest.mark.parametrize("num_streams", [0, 2])
def test_the_curve_is_drawn_with_and_without_streams(tmp_path, num_streams):
    weights = {f"stream_weight/{stream}": 1 / num_streams for stream in range(num_streams)}
    log = [{"loss": 3.0 - step, "num_tokens": 100 * step, **weights} for step in range(3)] + [{"train_runtime": 1}]
    plot_curve(log, tmp_path / "curve.png", "loss", "training loss (nats per token)")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_environment_names_what_gives_a_number():
    assert environment().keys() >= {"device", "python", "torch", "transformers", "peft", "trl", "accelerate"}
