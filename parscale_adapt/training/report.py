"""What a run leaves behind: the verified adapter, `metrics.json`, a loss curve and a model card."""

import json
import math
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import accelerate
import matplotlib
import peft
import torch
import transformers
import trl
from huggingface_hub import ModelCard, ModelCardData

from ..data import TokenReport
from ..tuner.config import ParScaleArguments
from ..tuner.state import backbone_shapes, expected_adapter_shapes, full_shape
from .run_folder import METRICS_FILE, write_atomically
from .saving import record_verified, replacing_folder, verify_save, whole_state
from .trainer import StreamTrainer


matplotlib.use("Agg")
from matplotlib import pyplot


def finish_run(
    trainer: StreamTrainer, streams: ParScaleArguments, run: dict[str, Any], report: TokenReport | None = None
) -> dict[str, Any]:
    """Measure, save and describe a finished run; every rank must call it.

    Args:
        trainer: after `train()`.
        streams: what was trained.
        run: settings for the card and the metrics, such as backbone and data.
        report: tokens per source.

    Returns:
        The content of `metrics.json`.
    """
    heldout_loss = trainer.heldout_loss() if trainer.eval_dataset is not None else None
    folder = Path(trainer.args.output_dir)
    model = trainer.accelerator.unwrap_model(trainer.model)
    state_dict = whole_state(model, trainer.adapter_name, keep=trainer.args.should_save)
    with replacing_folder(folder, trainer.args.should_save) as staging:
        if trainer.args.should_save:
            model.save_pretrained(staging, state_dict=state_dict)
            trainer.processing_class.save_pretrained(staging)
        num_tensors = verify_save(model, staging, trainer.adapter_name, trainer.args.should_save)
        metrics = _metrics(trainer, streams, run, report, heldout_loss)
        if trainer.args.should_save:
            record_verified(staging, num_tensors)
            write_atomically(staging / METRICS_FILE, json.dumps(metrics, indent=2))
            plot_loss(metrics["log_history"], staging / "loss_curve.png")
            write_card(metrics, folder.name, staging / "README.md")
    return metrics


def _metrics(
    trainer: StreamTrainer,
    streams: ParScaleArguments,
    run: dict[str, Any],
    report: TokenReport | None,
    heldout_loss: float | None,
) -> dict[str, Any]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    embeddings = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    embedding_names = {name for name, parameter in model.named_parameters() if id(parameter) in embeddings}
    backbone = {name: shape for name, shape in backbone_shapes(model).items() if name not in embedding_names}
    adapter = expected_adapter_shapes(model, trainer.adapter_name)
    num_adapter_params = sum(math.prod(shape) for shape in adapter.values())
    return {
        "num_streams": streams.num_streams,
        "num_params": sum(math.prod(shape) for shape in backbone.values()) + num_adapter_params,
        "num_adapter_params": num_adapter_params,
        "num_trained_params": sum(math.prod(full_shape(p)) for p in model.parameters() if p.requires_grad),
        "heldout_loss": heldout_loss,
        "num_tokens": trainer.state.num_input_tokens_seen,
        "num_steps": trainer.state.global_step,
        "streams": asdict(streams),
        "run": run,
        "sources": report.to_dict() if report is not None else None,
        "log_history": trainer.state.log_history,
        "environment": environment(),
    }


def environment() -> dict[str, str]:
    """Machine and versions that gave a number."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    modules = (torch, transformers, peft, trl, accelerate)
    return {
        "device": f"{device}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in modules},
    }


def plot_loss(log_history: list[dict[str, Any]], path: Path) -> None:
    """Training loss, and the streams' mean weights where there are several, against tokens."""
    points = [entry for entry in log_history if "loss" in entry]
    tokens = [entry["num_tokens"] / 1e6 for entry in points]
    weights = sorted({key for entry in points for key in entry if key.startswith("stream_weight/")})
    figure, axes = pyplot.subplots(
        2 if weights else 1, 1, figsize=(7, 6 if weights else 3.5), sharex=True, squeeze=False, layout="constrained"
    )
    axes[0, 0].plot(tokens, [entry["loss"] for entry in points], color="#0072B2")
    axes[0, 0].set_ylabel("training loss (nats per token)")
    axes[-1, 0].set_prop_cycle(color=["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"])
    for key in weights:
        number = key.rpartition("/")[2]
        axes[1, 0].plot(tokens, [entry.get(key) for entry in points], label=f"stream {number}")
    if weights:
        axes[1, 0].set_ylabel("mean aggregator weight")
        axes[1, 0].set_ylim(0, 1)
        axes[1, 0].legend(ncols=4, frameon=False, fontsize="small")
    axes[-1, 0].set_xlabel("tokens seen (millions)")
    for axis in axes[:, 0]:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write_card(metrics: dict[str, Any], name: str, path: Path) -> None:
    """A model card with the hub's metadata."""
    streams, run = metrics["streams"], metrics["run"]
    data = ModelCardData(
        library_name="peft",
        base_model=run["backbone"],
        tags=["parscale", "parallel-scaling", "parscale_adapt"],
        pipeline_tag="text-generation",
    )
    heldout = "not measured" if metrics["heldout_loss"] is None else f"{metrics['heldout_loss']:.4f} nats per token"
    rows = [
        ("backbone", f"`{run['backbone']}`" + (", trained" if streams["train_backbone"] else ", frozen")),
        ("streams P", streams["num_streams"]),
        ("prefix tokens per stream", streams["num_prefix_tokens"]),
        ("adapter parameters", f"{metrics['num_adapter_params']:,}"),
        ("data", ", ".join(run["data"])),
        ("tokens seen", f"{metrics['num_tokens']:,}"),
        ("held-out loss", heldout),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    settings = json.dumps(run, indent=2, default=str)
    versions = ", ".join(f"{name} {version}" for name, version in metrics["environment"].items())
    text = f"""---
{data.to_yaml()}
---

# {name}

Parallel streams (ParScale, [arXiv 2505.10475](https://arxiv.org/abs/2505.10475)) on `{run["backbone"]}`, trained with
`parscale_adapt`.

| | |
|---|---|
{table}

![loss curve](loss_curve.png)

```python
import parscale_adapt  # registers the method with PEFT
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("path/to/this/folder")
```

Run settings:

```json
{settings}
```

Made on {versions}.
"""
    ModelCard(text).save(path)
