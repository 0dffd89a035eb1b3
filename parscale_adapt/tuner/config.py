"""Configuration of the ParScale method: fields, help and checks."""

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig, PeftConfig, TaskType

from ..core.aggregator import AGGREGATORS
from ..core.transforms import STREAM_TRANSFORMS, named_transforms
from ..version import __version__
from .registration import PARSCALE
from .shared_lora import lora_config, lora_fields


CHOICES_OF_A_RUN = ("verify_backbone", "stream_chunk_size")  # which say nothing of what an adapter is
# What PEFT adds to `modules_to_save`.
HEADS_OF_TASKS = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}
STARTS_OF_PREFIXES = ("normal", "reparameterized", "tokens", "near_identity")


@dataclass
class ParScaleArguments:
    """What a user chooses about the streams. Shared by [`ParScaleConfig`] and the recipes' command lines."""

    num_streams: int = field(
        default=4, metadata={"help": "P, the number of parallel streams. 1 is the plain backbone."}
    )
    stream_transform: str | list[str] = field(
        default="prefix",
        metadata={
            "help": "What makes the streams differ: 'prefix' (the paper's choice: prefix keys and values in every "
            "attention layer), 'lora' (low-rank weights per stream in every linear layer), 'bitfit' (a bias per "
            "stream in every linear layer), or several of them. 'lora' and 'bitfit' also work where attention can't be "
            "reached.",
            "default": "prefix",  # which HfArgumentParser takes from the field only where it is no list
        },
    )
    num_prefix_tokens: int = field(
        default=48,
        metadata={"help": "With 'prefix': learned prefix keys and values per stream in every attention layer."},
    )
    stream_lora_rank: int = field(
        default=8, metadata={"help": "With 'lora': rank of each stream's own weights in every linear layer."}
    )
    stream_lora_alpha: float = field(
        default=16.0, metadata={"help": "With 'lora': each stream's own weights are scaled by alpha / rank."}
    )
    aggregator: str = field(
        default="dynamic",
        metadata={
            "help": "How the streams are mixed: 'dynamic' (the paper's choice: an MLP weighs them anew for every "
            "token), 'static' (one learned weight per stream) or 'mean' (nothing learned)."
        },
    )
    aggregator_smoothing: float = field(
        default=0.1, metadata={"help": "eps in w * (1 - eps) + eps / P; keeps every stream's weight above eps / P."}
    )
    init_std: float = field(
        default=0.02, metadata={"help": "Standard deviation of the normal distribution that new weights start from."}
    )
    init_weights: str = field(
        default="normal",
        metadata={
            "help": "How the prefixes start: 'normal' (the paper's N(0, init_std)), 'tokens' (keys and values that "
            "the backbone gives to tokens it generates itself, so that training starts near the backbone's own "
            "loss), 'near_identity' (keys that the backbone's queries hardly pick, so that training starts at its own "
            "loss; the difference is measured and logged), or 'reparameterized' (a small matrix through an MLP, folded "
            "into plain prefixes on save). PEFT's booleans both mean 'normal'."
        },
    )
    train_backbone: bool = field(
        default=False,
        metadata={
            "help": "False: only prefixes and aggregator learn. True: full continual pretraining; a save then "
            "carries the trained backbone as well."
        },
    )
    lora: LoraConfig | str | dict[str, Any] | None = field(  # the second type is what a command line is read as
        default=None,
        metadata={
            "help": "Low-rank weights on the backbone that all streams share, trained with them: the fields of PEFT's "
            'LoraConfig, as a mapping in YAML or as JSON, such as \'{"r": 8, "target_modules": "all-linear"}\'. With '
            "one stream it is a plain LoRA."
        },
    )
    stream_chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "Run so many streams at a time, which takes the activations of so many instead of all, and one more "
            "forward pass in training; gradients stay exact. The prompt that starts a cache is read so, too; what continues "
            "a cache runs all at once. None: all. A choice of the run, never saved with an adapter."
        },
    )

    def __post_init__(self):
        if type(self.num_streams) is not int or self.num_streams < 1:
            raise ValueError(f"`num_streams` must be an integer of at least 1, got {self.num_streams!r}.")
        if type(self.num_prefix_tokens) is not int or self.num_prefix_tokens < 1:
            raise ValueError(f"`num_prefix_tokens` must be an integer of at least 1, got {self.num_prefix_tokens!r}.")
        if not 0 <= self.aggregator_smoothing < 1:
            raise ValueError(f"`aggregator_smoothing` must lie in [0, 1), got {self.aggregator_smoothing!r}.")
        if not self.init_std > 0:
            raise ValueError(f"`init_std` must be positive, got {self.init_std!r}.")
        if isinstance(self.init_weights, bool):
            self.init_weights = "normal"
        self._check_choice("init_weights", STARTS_OF_PREFIXES)
        self.stream_transform = _in_order(self.stream_transform)
        self._check_choice("aggregator", tuple(AGGREGATORS))
        if type(self.stream_lora_rank) is not int or self.stream_lora_rank < 1:
            raise ValueError(f"`stream_lora_rank` must be an integer of at least 1, got {self.stream_lora_rank!r}.")
        if not self.stream_lora_alpha > 0:
            raise ValueError(f"`stream_lora_alpha` must be positive, got {self.stream_lora_alpha!r}.")
        if self.lora is not None:
            self.lora = lora_fields(lora_config(self.lora))
            if self.train_backbone:
                raise ValueError(
                    "`lora` adds low-rank weights to a backbone that `train_backbone=True` trains as a whole: leave one "
                    "of the two out."
                )
        check_stream_chunk_size(self.stream_chunk_size)
        self._refuse_fields_of_other_transforms()

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")

    def _refuse_fields_of_other_transforms(self) -> None:
        defaults = {item.name: item.default for item in dataclasses.fields(ParScaleArguments)}
        chosen = named_transforms(self.stream_transform)
        for transform, kind in STREAM_TRANSFORMS.items():
            for name in kind.fields:
                value = getattr(self, name)
                if kind not in chosen and value != defaults[name]:
                    raise ValueError(
                        f"`{name}` belongs to `stream_transform={transform!r}`, got {value!r} with "
                        f"`stream_transform={self.stream_transform!r}`: leave it at {defaults[name]!r}."
                    )


def check_stream_chunk_size(size: Any) -> None:
    """Raise ValueError unless so many streams can run at a time."""
    if size is not None and (type(size) is not int or size < 1):
        raise ValueError(f"`stream_chunk_size` must be None or an integer of at least 1, got {size!r}.")


def _in_order(stream_transform: Any) -> str | list[str]:
    """One name, or several in an order of their own: equal settings are written in one way.

    Raises:
        ValueError: there is no name, an unknown one, or one twice.
    """
    names = [stream_transform] if isinstance(stream_transform, str) else stream_transform
    is_list = isinstance(names, list | tuple)
    if not is_list or not names or any(name not in (*STREAM_TRANSFORMS,) or names.count(name) > 1 for name in names):
        raise ValueError(
            f"`stream_transform` must be one of {', '.join(STREAM_TRANSFORMS)}, or a list of several, each once, got "
            f"{stream_transform!r}."
        )
    ordered = [name for name in STREAM_TRANSFORMS if name in names]
    return ordered[0] if len(ordered) == 1 else ordered


class _RuntimeConfig:
    """What PEFT's loading functions write into the configuration that they are about to attach; see
    [`ParScaleConfig.is_being_loaded`]."""

    def __init__(self, config: "ParScaleConfig"):
        self._config = config

    @property
    def ephemeral_gpu_offload(self) -> bool:
        """Always False: streams have nothing to move to a GPU for a moment."""
        return False

    @ephemeral_gpu_offload.setter
    def ephemeral_gpu_offload(self, value: bool) -> None:
        if value:
            raise ValueError(
                "`ephemeral_gpu_offload` is an option of LoRA's, got True for a ParScale adapter: leave it out."
            )
        self._config.is_being_loaded = True


@dataclass
class ParScaleConfig(ParScaleArguments, PeftConfig):
    """Configuration of parallel streams on a causal LM, or on a decoder with another head or none, to be passed to
    [`peft.get_peft_model`].

    A model keeps a copy of it, to which it adds what it found. So the same configuration, be it new or read from a
    file, can start any number of adapters on any backbones.

    Besides the fields of [`ParScaleArguments`] and of [`peft.PeftConfig`]:

    Args:
        task_type: `CAUSAL_LM`, or `SEQ_CLS`, `TOKEN_CLS`, `QUESTION_ANS` (the head, which sees the mixed states, is
            trained and saved with the adapter), or `FEATURE_EXTRACTION`, as in PEFT.
        target_modules: names of the decoder and of the attention modules and linear layers in which streams differ.
            Found by running a few tokens through the backbone, never set by the user.
        modules_to_save: as in PEFT, further modules to train and save with the adapter; heads other than that of a causal
            LM are added.
        backbone_fingerprint: what the adapter was trained on; checked when it is loaded.
        verify_backbone: False loads the adapter onto a backbone with another fingerprint, with a warning. Pass it to
            `PeftModel.from_pretrained`; it is never saved.
        parscale_version: the version of this package that made the adapter; set on its first save.
    """

    task_type: str | None = "CAUSAL_LM"
    target_modules: tuple[str, ...] | list[str] | str | None = None
    modules_to_save: list[str] | None = None
    backbone_fingerprint: dict[str, str] | None = None
    verify_backbone: bool = True
    parscale_version: str | None = None

    def __post_init__(self):
        ParScaleArguments.__post_init__(self)
        PeftConfig.__post_init__(self)
        if self.task_type == TaskType.SEQ_2_SEQ_LM:
            raise ValueError(
                f"`task_type` must be one of {', '.join(task for task in TaskType if task != TaskType.SEQ_2_SEQ_LM)}, got "
                "'SEQ_2_SEQ_LM': streams run through a decoder alone, and such models have an encoder."
            )
        heads = HEADS_OF_TASKS.get(self.task_type, ())
        if self.train_backbone and not set(self.modules_to_save or ()) <= set(heads):
            raise ValueError(
                f"`modules_to_save` names parts of the backbone, got {self.modules_to_save}, but `train_backbone=True` "
                "already trains and saves all of it: leave one of the two out."
            )
        self.lora = None if self.lora is None else lora_config(self.lora)
        self.peft_type = PARSCALE
        if self.target_modules is not None and self.backbone_fingerprint is None:  # a file has both
            raise ValueError(
                f"`target_modules` can't be chosen, got {self.target_modules!r}: streams run through every attention "
                "module of the backbone, which are found by running one token through it."
            )
        # Whether tensors from a file follow the coming attach; they replace any start, and ask for their backbone.
        # `get_peft_model` and `PeftModel.from_pretrained` attach in the same way, but the latter and `load_adapter`
        # say before how to offload: to `runtime_config`, and to `from_pretrained` below.
        self.is_being_loaded = False

    @property
    def runtime_config(self) -> _RuntimeConfig:
        """Where `PeftModel.from_pretrained`, and only it, writes how to offload."""
        return _RuntimeConfig(self)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> "ParScaleConfig":
        """As [`peft.PeftConfig.from_pretrained`]; `stream_chunk_size`, which no file has, may be given."""
        size = kwargs.pop("stream_chunk_size", None)
        check_stream_chunk_size(size)
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        config.stream_chunk_size = size
        if "ephemeral_gpu_offload" in kwargs:  # `PeftModel.load_adapter`
            config.runtime_config.ephemeral_gpu_offload = kwargs["ephemeral_gpu_offload"]
        return config

    def handed_over(self) -> "ParScaleConfig":
        """A copy for a model to keep; what PEFT said of the coming attach goes with it, and counts once."""
        copied = copy.deepcopy(self)
        self.is_being_loaded = False
        return copied

    def to_dict(self) -> dict:
        """The fields that are saved."""
        fields = super().to_dict()
        for name in CHOICES_OF_A_RUN:
            del fields[name]
        fields["parscale_version"] = self.parscale_version or __version__
        fields["lora"] = None if self.lora is None else lora_fields(self.lora)
        return fields
