"""Options of TRL and transformers that could do nothing in a recipe; giving one is refused."""

from dataclasses import MISSING, dataclass, fields
from typing import Any

from transformers.trainer_utils import HubStrategy

from .stream_config import RecipeConfig


CPT, SFT, DPO, REWARD, GRPO, DISTILL = "cpt.py", "sft.py", "dpo.py", "reward.py", "grpo.py", "distill.py"
ALL = (CPT, SFT, DPO, REWARD, GRPO, DISTILL)


@dataclass(frozen=True)
class UnusedOption:
    """An option that has no effect.

    Args:
        name: field of the configurations of TRL's trainers.
        remedy: what to do instead.
        recipes: where it has none.
        allowed: values that may be given all the same, besides the default.
        unless: an option or property that gives it an effect.
    """

    name: str
    remedy: str
    recipes: tuple[str, ...] = ALL
    allowed: tuple[Any, ...] = ()
    unless: str | None = None


_LOADING = "say how to load the backbone with --dtype, --attn_implementation and --model_revision"
_PACKED = "rows are packed already, each document apart, so leave it out"
_PUSHED = "the final folder is pushed once, when it is complete, so leave it out"
_MASK = "choose what is trained with --train_on"
_SAMPLING = (GRPO, DISTILL)
_SAMPLING_OPTIONS = (  # the temperature is that of the divergence as well
    "max_completion_length",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "generation_kwargs",
    "cache_implementation",
    "ds3_gather_for_generation",
)
_REFERENCE_OPTIONS = ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps")
UNUSED_OPTIONS = (
    UnusedOption("model_init_kwargs", _LOADING),
    UnusedOption("dataset_kwargs", "the recipes prepare their rows themselves, so leave it out", (CPT, SFT)),
    UnusedOption("enable_jit_checkpoint", "on SIGTERM every run saves a checkpoint and ends, so leave it out"),
    *(
        UnusedOption(name, "push the final folder with --push_to_hub true, or leave it out", unless="push_to_hub")
        for name in ("hub_model_id", "hub_token", "hub_private_repo", "hub_revision")
    ),
    UnusedOption("hub_strategy", _PUSHED, allowed=(HubStrategy.END,)),
    UnusedOption("hub_always_push", _PUSHED),
    UnusedOption("dataset_text_field", "name the column of raw text with --text_field of cpt.py", (CPT, SFT)),
    UnusedOption("assistant_only_loss", "all of the text is trained, so leave it out", (CPT,)),
    UnusedOption("assistant_only_loss", f"{_MASK} all_answers", (SFT,)),
    UnusedOption("completion_only_loss", "all of the text is trained, so leave it out", (CPT,)),
    UnusedOption("completion_only_loss", f"{_MASK} last_answer or all_text", (SFT,)),
    UnusedOption("packing", _PACKED, (CPT,)),
    UnusedOption("padding_free", _PACKED, (CPT,)),
    UnusedOption("padding_free", "pack the rows with --packing true", (SFT,), unless="packing"),
    UnusedOption("packing_strategy", _PACKED, (CPT,)),
    UnusedOption("packing_strategy", "rows are cut to `max_length` before they are packed, so leave it out", (SFT,)),
    UnusedOption("eval_packing", _PACKED, (CPT,)),
    UnusedOption("eval_packing", "pack the training rows too, with --packing true", (SFT,), (False,), "packing"),
    UnusedOption("pad_to_multiple_of", "packed rows all have `max_length` tokens, so leave it out", (CPT,)),
    UnusedOption("shuffle_dataset", "the rows come shuffled and mixed, so leave it out", (CPT,)),
    UnusedOption("train_sampling_strategy", "the rows come shuffled and mixed, so leave it out", (CPT,)),
    UnusedOption("truncation_mode", "nothing is cut, long documents go on in the next row, so leave it out", (CPT,)),
    UnusedOption("dataset_num_proc", "rows are packed by one process, so leave it out", (CPT,)),
    UnusedOption("truncation_mode", "pairs of more than `max_length` tokens are left out, so leave it out", (DPO,)),
    UnusedOption("padding_free", "TRL pads pairs anyway, so leave it out", (DPO,)),
    *(
        UnusedOption(name, "the reference stays the model as it was before, so leave it out", (DPO, GRPO))
        for name in _REFERENCE_OPTIONS
    ),
    UnusedOption("max_tool_calling_iterations", "answers call no tools, so leave it out", _SAMPLING),
    UnusedOption("log_multimodal", "questions are text, so leave it out", (GRPO,)),
    UnusedOption(
        "transformers_continuous_batching_config",
        "batch so with --use_transformers_continuous_batching true, or leave it out",
        (GRPO,),
        unless="use_transformers_continuous_batching",
    ),
    UnusedOption("remove_unused_columns", "reward functions get all columns, so leave it out", (GRPO,)),
    UnusedOption("remove_unused_columns", "rows are token ids already, so leave it out", (DISTILL,)),
    UnusedOption("chat_template_kwargs", "rows may have a column `chat_template_kwargs`, so leave it out", (DISTILL,)),
    UnusedOption("teacher_model_revision", "the teacher is an adapter in a folder, so leave it out", (DISTILL,)),
    UnusedOption(
        "teacher_model_init_kwargs", "the teacher runs on the student's backbone, so leave it out", (DISTILL,)
    ),
    *(
        UnusedOption(
            name,
            "the answers of the data are compared and none is sampled, so leave it or --train_on_data out",
            (DISTILL,),
            unless="samples_answers",
        )
        for name in _SAMPLING_OPTIONS
    ),
)


def refuse_unused_options(training: RecipeConfig, recipe: str) -> None:
    """Refuse options that were given and would do nothing.

    Args:
        training: as it was given, before a recipe changes it.
        recipe: one of [`ALL`].

    Raises:
        ValueError: there is one; it is named, with what to do instead.
    """
    defaults = {field.name: field.default for field in fields(training) if field.default is not MISSING}
    for option in UNUSED_OPTIONS:
        if recipe not in option.recipes or option.name not in defaults:
            continue
        value = getattr(training, option.name)
        if value in (defaults[option.name], *option.allowed):
            continue
        if option.name == "pad_to_multiple_of" and value is None:  # what TRL makes of the default
            continue
        if option.unless is None or not getattr(training, option.unless):
            found = "one" if option.name == "hub_token" else repr(value)
            raise ValueError(f"`{option.name}` has no effect in {recipe}, got {found}: {option.remedy}.")
