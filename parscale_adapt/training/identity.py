"""What makes a run the run that it is: its data, and every setting but for those that can't change a trained number."""

import dataclasses
import platform
from pathlib import Path
from typing import Any

from transformers import SchedulerType

from ..data import content_of, fingerprint_of_files
from ..tuner.config import CHOICES_OF_A_RUN, ParScaleArguments
from .arguments import BackboneArguments
from .rewards import file_of
from .stream_config import RecipeConfig


# How often is measured changes nothing of what is trained: `StreamTrainer` keeps the random states apart.
_EVALUATION = frozenset(
    {
        "batch_eval_metrics",
        "do_eval",
        "eval_accumulation_steps",
        "eval_delay",
        "eval_do_concat_batches",
        "eval_on_start",
        "eval_packing",
        "eval_steps",
        "eval_strategy",
        "eval_use_gather_object",
        "include_for_metrics",
        "num_generations_eval",
        "per_device_eval_batch_size",
        "prediction_loss_only",
    }
)
_SAVING = frozenset(
    {
        "enable_jit_checkpoint",
        "save_on_each_node",
        "save_only_model",
        "save_steps",
        "save_strategy",
        "save_total_limit",
    }
)
_LOGGING = frozenset(
    {
        "debug",
        "disable_tqdm",
        "include_num_input_tokens_seen",
        "log_level",
        "log_completions",
        "log_completions_hub_repo",
        "log_level_replica",
        "log_on_each_node",
        "log_unique_prompts",
        "logging_first_step",
        "logging_nan_inf_filter",
        "logging_steps",
        "logging_strategy",
        "num_completions_to_print",
        "project",
        "report_to",
        "run_name",
        "skip_memory_metrics",
        "trackio_bucket_id",
        "trackio_space_id",
        "trackio_static_space_id",
    }
)
_HUB = frozenset(
    {
        "hub_always_push",
        "hub_model_id",
        "hub_private_repo",
        "hub_revision",
        "hub_strategy",
        "hub_token",
        "push_to_hub",
    }
)
_MACHINE = frozenset(
    {
        "dataloader_multiprocessing_context",
        "dataloader_num_workers",
        "dataloader_persistent_workers",
        "dataloader_pin_memory",
        "dataloader_prefetch_factor",
        "dataset_num_proc",
        "ddp_timeout",
        "local_rank",
        "torch_empty_cache_steps",
    }
)
_UNUSED_BY_RECIPES = frozenset({"do_predict", "do_train", "output_dir"})
_RESUMING = frozenset({"restart_optimizer", "resume_from_checkpoint"})
MAY_DIFFER = _EVALUATION | _SAVING | _LOGGING | _HUB | _MACHINE | _UNUSED_BY_RECIPES | _RESUMING

_TOKENIZER_FILES = ("*token*", "vocab*", "merges.txt", "chat_template*")
_STEERED_BY_EVALUATION = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)


def run_identity(
    recipe: str, streams: ParScaleArguments, backbone: BackboneArguments, data: Any, training: RecipeConfig
) -> dict[str, Any]:
    """The settings and the data that decide a run's numbers, for [`parscale_adapt.training.run_folder.RunFolder`].

    Raises:
        ValueError: there is no such data.
    """
    fields = dataclasses.asdict(streams)
    return {
        "recipe": recipe,
        "streams": {name: value for name, value in fields.items() if name not in CHOICES_OF_A_RUN},
        "backbone": backbone.model_name_or_path or "embedded",
        "model_revision": backbone.model_revision,
        "adapter": backbone.adapter_name_or_path,
        "dtype": backbone.dtype,
        "attn_implementation": backbone.attn_implementation,
        "load_in_4bit": backbone.load_in_4bit,
        "data": [source.path for source in data.sources()] or [data.embedded_name],
        "data_settings": dataclasses.asdict(data),
        "content": _content(backbone, data, training) | _start(recipe, backbone, training),
        "world_size": training.world_size,
        **_deciding_settings(training),
    }


def _content(backbone: BackboneArguments, data: Any, training: RecipeConfig) -> dict[str, str]:
    """What lies behind the names of data, chat template and tokenizer; what can't be known is left out."""
    contents = {source.label: content_of(source) for source in data.sources()}
    if not contents:
        contents[data.embedded_name] = f"Python {platform.python_version()}"
    heldout = data.heldout_source()
    if heldout is not None:
        contents[f"held out: {heldout.label}"] = content_of(heldout)
    for template in (getattr(data, "chat_template", None), getattr(training, "chat_template_path", None)):
        if template is not None and Path(template).is_file():
            contents[f"chat template: {template}"] = fingerprint_of_files([template])
    for name in getattr(data, "reward_functions", ()):
        file = file_of(name)
        if file is not None and file.is_file():
            contents[f"reward function: {name}"] = fingerprint_of_files([file])
    folder = backbone.model_name_or_path
    if folder is not None and Path(folder).expanduser().is_dir():
        files = {path for name in _TOKENIZER_FILES for path in Path(folder).expanduser().glob(name)}
        contents[f"tokenizer: {folder}"] = fingerprint_of_files(sorted(files))
    return {name: content for name, content in contents.items() if content is not None}


def _start(recipe: str, backbone: BackboneArguments, training: RecipeConfig) -> dict[str, str]:
    """What a run is compared with all the time, and not only where it begins."""
    has_reference = recipe == "dpo" or (recipe == "grpo" and bool(training.beta))
    references = {
        "adapter": backbone.adapter_name_or_path if has_reference else None,
        "teacher": getattr(training, "teacher_model_name_or_path", None),
    }
    found = {}
    for what, adapter in references.items():
        if adapter is not None and Path(adapter).expanduser().is_dir():
            weights = sorted(Path(adapter).expanduser().glob("adapter_model*"))
            found[f"{what}: {adapter}"] = fingerprint_of_files(weights)
    return found


def _deciding_settings(training: RecipeConfig) -> dict[str, Any]:
    """The fields of TRL's arguments, but for those that may differ in this run."""
    may_differ = MAY_DIFFER
    if training.lr_scheduler_type in _STEERED_BY_EVALUATION:
        may_differ -= _EVALUATION
    if training.load_best_model_at_end:
        may_differ -= _EVALUATION | _SAVING
    names = [field.name for field in dataclasses.fields(training) if field.name not in may_differ]
    return {name: getattr(training, name) for name in names}
