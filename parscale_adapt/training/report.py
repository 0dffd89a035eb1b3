"""What a run says of itself once its model is saved: `metrics.json`, a loss curve and a model card."""

import json
import math
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import accelerate
import peft
import torch
import transformers
import trl
from huggingface_hub import ModelCard, ModelCardData
from rich.box import SIMPLE
from rich.table import Table

from ..checkpoints.folders import transform_names
from ..data import TokenReport
from ..files import write_atomically, write_text
from ..terminal import console
from ..tuner.config import ParScaleArguments
from ..tuner.state import backbone_shapes, expected_adapter_shapes, full_shape, saved_module_shapes
from .failures import describe
from .hub import push_final_folder
from .run_folder import METRICS_FILE
from .saving import save_final_model
from .stream_training import StreamTraining


def finish_run(
    trainer: StreamTraining, streams: ParScaleArguments, run: dict[str, Any], report: TokenReport | None = None
) -> dict[str, Any]:
    """Save what was trained; then measure and describe it, and push it where that was asked for. Every rank must call it.

    Args:
        trainer: after `train()`.
        streams: what was trained.
        run: settings for the card and the metrics, such as backbone and data.
        report: tokens per source.

    Returns:
        The content of `metrics.json`.

    Raises:
        TrainingStopped: the model could not be saved.
        ValueError: it was saved, but not all that follows could be done.
    """
    folder = Path(trainer.args.output_dir)
    model = trainer.accelerator.unwrap_model(trainer.model)
    try:
        save_final_model(model, trainer.processing_class, folder, trainer.adapter_name, trainer.args.should_save)
    except Exception as error:
        raise trainer.stopped_by(error) from error
    try:
        heldout_loss = trainer.heldout_loss() if trainer.eval_dataset is not None else None
        metrics = _metrics(trainer, streams, run, report, heldout_loss)
        if trainer.args.should_save:
            _describe_run(trainer, metrics, folder)
            console().print(results_table(metrics, folder))
    except Exception as error:
        raise ValueError(
            f"the trained model lies in {folder}, saved and verified, but it could not be measured and described: "
            f"{describe(error)}"
        ) from error
    if trainer.args.push_to_hub and trainer.is_world_process_zero():
        push_final_folder(folder, trainer.hub_model_id, trainer.args)
    return metrics


def _describe_run(trainer: StreamTraining, metrics: dict[str, Any], folder: Path) -> None:
    from .plots import plot_curve  # matplotlib is needed here alone

    write_text(folder / METRICS_FILE, json.dumps(metrics, indent=2, default=str))
    label = trainer.curve_label or f"training {trainer.loss_label}"
    write_atomically(
        folder / f"{trainer.curve}_curve.png",
        lambda path: plot_curve(metrics["log_history"], path, trainer.curve, label),
    )
    write_card(metrics, folder.name, folder / "README.md", trainer.loader, trainer.pipeline_tag)


def _metrics(
    trainer: StreamTraining,
    streams: ParScaleArguments,
    run: dict[str, Any],
    report: TokenReport | None,
    heldout_loss: float | None,
) -> dict[str, Any]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    embeddings = {
        id(module.weight)
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
        if module is not None
    }
    embedding_names = {name for name, parameter in model.named_parameters() if id(parameter) in embeddings}
    backbone = {name: shape for name, shape in backbone_shapes(model).items() if name not in embedding_names}
    adapter = expected_adapter_shapes(model, trainer.adapter_name) | saved_module_shapes(model, trainer.adapter_name)
    start = trainer.near_identity_start()
    num_adapter_params = sum(math.prod(shape) for shape in adapter.values())
    return {
        "num_streams": streams.num_streams,
        "num_params": sum(math.prod(shape) for shape in backbone.values()) + num_adapter_params,
        "num_adapter_params": num_adapter_params,
        "num_trained_params": sum(math.prod(full_shape(p)) for p in model.parameters() if p.requires_grad),
        "loss": trainer.loss_label,
        "curve": trainer.curve,
        "heldout_loss": heldout_loss,
        "heldout": trainer.heldout_metrics,
        "near_identity_start": None if start is None else start._asdict(),
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


def results_table(metrics: dict[str, Any], folder: Path) -> Table:
    """What a run ends with on the terminal: the figures of its card, and where the rest lies."""
    table = Table(title="Trained", box=SIMPLE, show_header=False)
    for name, value in _card_rows(metrics):
        table.add_row(name, str(value).replace("`", ""))
    table.add_row("saved in", str(folder))
    table.add_row("curve and figures", f"{metrics['curve']}_curve.png and {METRICS_FILE} in it")
    return table


def write_card(
    metrics: dict[str, Any],
    name: str,
    path: Path,
    loader: str = StreamTraining.loader,
    pipeline_tag: str = StreamTraining.pipeline_tag,
) -> None:
    """A model card with the hub's metadata.

    Args:
        metrics: the content of `metrics.json`.
        name: of the model.
        path: the file to write.
        loader, pipeline_tag: as in [`StreamTraining`].
    """
    run = metrics["run"]
    data = ModelCardData(
        library_name="peft",
        base_model=run["backbone"],
        tags=["parscale", "parallel-scaling", "parscale_adapt"],
        pipeline_tag=pipeline_tag,
    )
    table = "\n".join(f"| {name} | {value} |" for name, value in _card_rows(metrics))
    settings = json.dumps({name: value for name, value in run.items() if value is not None}, indent=2, default=str)
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

![{metrics["curve"]} curve]({metrics["curve"]}_curve.png)

```python
import parscale_adapt  # registers the method with PEFT
from peft import {loader}

model = {loader}.from_pretrained("path/to/this/folder")
```

Run settings:

```json
{settings}
```

Made on {versions}.
"""
    write_atomically(path, ModelCard(text).save)


def _card_rows(metrics: dict[str, Any]) -> list[tuple[str, Any]]:
    streams, run = metrics["streams"], metrics["run"]
    transforms = transform_names(streams["stream_transform"])
    loss = metrics["heldout_loss"]
    heldout = "not measured" if loss is None else f"{loss:.4f} nats per {metrics['loss'].split()[-1].strip(')')}"
    return [
        ("backbone", f"`{run['backbone']}`" + (", trained" if streams["train_backbone"] else ", frozen")),
        ("streams P", streams["num_streams"]),
        ("streams differ by", " and ".join(transforms)),
        *([("prefix tokens per stream", streams["num_prefix_tokens"])] if "prefix" in transforms else []),
        ("adapter parameters", f"{metrics['num_adapter_params']:,}"),
        ("data", ", ".join(run["data"])),
        ("tokens seen", f"{metrics['num_tokens']:,}"),
        *([] if loss is None and metrics["heldout"] else [("held-out loss", heldout)]),
        *((f"held-out {key}", f"{value:.4g}") for key, value in metrics["heldout"].items()),
    ]
