"""Which ways of running go together; checked before any weight loads."""

import os
from dataclasses import dataclass

from transformers.trainer_utils import HubStrategy
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from ..hf.prefixed_attention import SUPPORTED_IMPLEMENTATIONS
from ..tuner.config import ParScaleArguments
from .arguments import BackboneArguments
from .learning_rates import RATE_OPTIONS
from .stream_config import RecipeConfig
from .unused_options import CPT, refuse_unused_options


@dataclass(frozen=True)
class Combination:
    """Properties of a run that exclude each other, and what to do instead."""

    properties: frozenset[str]
    reason: str


_WHOLE_FOR_BATCHING = "continuous batching needs whole parameters: leave --use_transformers_continuous_batching out"
FORBIDDEN_COMBINATIONS = (
    Combination(frozenset({"continuous_batching", "zero3"}), _WHOLE_FOR_BATCHING),
    Combination(frozenset({"continuous_batching", "fsdp"}), _WHOLE_FOR_BATCHING),
    Combination(
        frozenset({"load_in_4bit", "train_backbone"}),
        "4-bit weights can't be trained: use --train_backbone false, or leave --load_in_4bit out",
    ),
    Combination(
        frozenset({"load_in_4bit", "zero3"}),
        "ZeRO-3 doesn't shard 4-bit weights at load: use accelerate_configs/zero2.yaml",
    ),
    Combination(
        frozenset({"load_in_4bit", "fsdp"}),
        "4-bit weights under FSDP2 are untested: use accelerate_configs/ddp.yaml or zero2.yaml",
    ),
    Combination(frozenset({"fsdp1"}), "only FSDP2 is supported: use accelerate_configs/fsdp2.yaml"),
    Combination(
        frozenset({"fsdp_cpu_ram_efficient_loading"}),
        "streams look at the backbone's weights on every rank: use accelerate_configs/fsdp2.yaml, which loads them",
    ),
    Combination(
        frozenset({"fsdp_activation_checkpointing"}),
        "it renames the modules that streams live in: use --gradient_checkpointing true",
    ),
    Combination(
        frozenset({"one_stream", "frozen", "no_lora"}),
        "one stream on a frozen backbone has nothing to learn: use --num_streams 2 or more, --lora, or --train_backbone "
        "true",
    ),
    Combination(
        frozenset({"lora_learning_rate", "no_lora"}),
        "there is no shared LoRA: leave --lora_learning_rate out, or add one by --lora",
    ),
    Combination(
        frozenset({"prefix_learning_rate", "one_stream"}), "one stream has no prefix: leave --prefix_learning_rate out"
    ),
    Combination(
        frozenset({"aggregator_learning_rate", "one_stream"}),
        "one stream has no aggregator: leave --aggregator_learning_rate out",
    ),
    Combination(
        frozenset({"diversity_weight", "one_stream"}),
        "one stream has no other to differ from: leave --diversity_weight out",
    ),
    Combination(
        frozenset({"aggregator_learning_rate", "mean_aggregator"}),
        "a mean has nothing to learn: leave --aggregator_learning_rate out",
    ),
)


def run_properties(streams: ParScaleArguments, backbone: BackboneArguments, training: RecipeConfig) -> set[str]:
    """The properties of a run that [`FORBIDDEN_COMBINATIONS`] speaks of."""
    uses_fsdp = _is_set("ACCELERATE_USE_FSDP") or bool(training.fsdp)
    fsdp = training.fsdp_plugin_args or {}
    zero_stage = training.deepspeed_plugin.zero_stage if training.deepspeed_plugin is not None else 0
    present = {
        "load_in_4bit": backbone.load_in_4bit,
        "train_backbone": streams.train_backbone,
        "frozen": not streams.train_backbone,
        "one_stream": streams.num_streams == 1,
        "mean_aggregator": streams.aggregator == "mean",
        "diversity_weight": getattr(training, "diversity_weight", 0.0) > 0,
        "no_lora": streams.lora is None and backbone.adapter_name_or_path is None,  # that adapter may have one
        "continuous_batching": getattr(training, "use_transformers_continuous_batching", False),
        **{name: getattr(training, name, None) is not None for name in RATE_OPTIONS},
        "zero3": zero_stage == 3,
        "fsdp": uses_fsdp,
        "fsdp1": uses_fsdp and (fsdp.get("fsdp_version") or int(os.environ.get("FSDP_VERSION", "1"))) == 1,
        "fsdp_activation_checkpointing": uses_fsdp
        and (_is_set("FSDP_ACTIVATION_CHECKPOINTING") or fsdp.get("activation_checkpointing", False)),
        "fsdp_cpu_ram_efficient_loading": uses_fsdp and _is_set("FSDP_CPU_RAM_EFFICIENT_LOADING"),
    }
    return {name for name, holds in present.items() if holds}


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def prepare_packed_training(training: RecipeConfig, backbone: BackboneArguments) -> None:
    """Set what training on our own packed rows needs in TRL's arguments.

    Raises:
        ValueError: an option was given that would have no effect.
    """
    refuse_unused_options(training, CPT)
    training.dataset_kwargs = {"skip_prepare_dataset": True}
    training.include_num_input_tokens_seen = "all"  # rows are full, and come without the mask that padding is read off
    training.train_sampling_strategy = "sequential"  # the rows come shuffled and mixed
    prepare_training(training, backbone)


def prepare_training(training: RecipeConfig, backbone: BackboneArguments) -> None:
    """Set what every recipe needs in TRL's arguments.

    Raises:
        ValueError: two options name a chat template.
    """
    if {"chat_template", "chat_template_path"} <= backbone.explicit_settings:
        raise ValueError("`chat_template` and `chat_template_path` both name a chat template: give one of them.")
    training.prediction_loss_only = True
    training.hub_strategy = HubStrategy.END  # what checkpoints hold is not pushed
    if backbone.adapter_name_or_path is None:
        training.model_init_kwargs = backbone.model_init_kwargs()


def check_run(streams: ParScaleArguments, backbone: BackboneArguments, training: RecipeConfig) -> None:
    """Refuse a run that can't work.

    Raises:
        ValueError: a forbidden combination, with what to do instead; processes that don't see each other; or a setting
            out of range.
    """
    num_launched = int(os.environ.get("WORLD_SIZE", "1"))
    if training.world_size != num_launched:
        raise ValueError(
            f"{num_launched} processes were launched, but each would train alone: on CPUs, pass `--use_cpu true`."
        )
    if not backbone.verify_backbone and backbone.adapter_name_or_path is None:
        raise ValueError(
            "`verify_backbone=False` lets an adapter run on another backbone, but no adapter is named: give "
            "--adapter_name_or_path, or leave it out."
        )
    properties = run_properties(streams, backbone, training)
    for combination in FORBIDDEN_COMBINATIONS:
        if combination.properties <= properties:
            raise ValueError(f"{' with '.join(sorted(combination.properties))} can't run: {combination.reason}.")
    is_installed = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
    if backbone.attn_implementation in is_installed and not is_installed[backbone.attn_implementation](True):
        raise ValueError(
            f"`attn_implementation={backbone.attn_implementation!r}` needs a package that isn't installed for this GPU: "
            "install it, or take 'sdpa'."
        )
    if backbone.attn_implementation not in SUPPORTED_IMPLEMENTATIONS:
        raise ValueError(
            f"`attn_implementation` must be one of {', '.join(SUPPORTED_IMPLEMENTATIONS)} for streams, got "
            f"{backbone.attn_implementation!r}."
        )
    max_length = getattr(training, "max_length", 2)  # trainers that sample answers know none
    if max_length is None or max_length < 2:
        raise ValueError(f"`max_length` must be at least 2 tokens per row, got {max_length!r}.")
