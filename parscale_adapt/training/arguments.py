"""Command-line arguments of the recipes, besides TRL's own and [`parscale_adapt.tuner.config.ParScaleArguments`]."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import BitsAndBytesConfig

from ..data import TextSource, default_heldout_split


@dataclass
class BackboneArguments:
    """The model that is run in streams."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Hub name or local folder of a causal LM. Without one, a small Qwen2 is pretrained once on the "
            "Python standard library's source and kept in --embedded_dir."
        },
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a hub model."})
    dtype: str = field(default="float32", metadata={"help": "Type of the backbone's weights, e.g. bfloat16."})
    attn_implementation: str = field(
        default="sdpa",
        metadata={"help": "Attention: sdpa, eager, flex_attention, flash_attention_2 or flash_attention_3."},
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "Load the frozen backbone in bitsandbytes NF4."})
    adapter_name_or_path: str | None = field(
        default=None, metadata={"help": "Go on training the streams of this adapter instead of new ones."}
    )
    verify_backbone: bool = field(
        default=True,
        metadata={
            "help": "False puts the adapter of --adapter_name_or_path on a backbone with another fingerprint than the "
            "one that it was trained on, with a warning."
        },
    )
    embedded_dir: str = field(
        default="runs/embedded", metadata={"help": "Where the embedded backbone is kept, under its content hash."}
    )
    # Of all arguments of the recipe; noted by `RecipeParser`, since a value does not tell whether it is a default.
    explicit_settings: frozenset[str] = field(default=frozenset(), init=False)

    def model_init_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of `from_pretrained` for [`trl.SFTConfig.model_init_kwargs`]."""
        return {
            "revision": self.model_revision,
            "dtype": self.dtype,
            "attn_implementation": self.attn_implementation,
        }

    def quantization_config(self) -> BitsAndBytesConfig | None:
        """NF4 with double quantization, computing in `dtype`; None in full precision."""
        if not self.load_in_4bit:
            return None
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=self.dtype,
        )


@dataclass
class DataArguments:
    """Raw text to train on. In a YAML file `datasets` mixes several sources by weight."""

    embedded_name: ClassVar[str] = "standard library"  # of the text without a name
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub dataset, or local file, glob or folder (see docs/data.md). Without one, the Python standard "
            "library's source files."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_encoding: str = field(default="utf-8", metadata={"help": "Encoding of local text files."})
    text_field: str = field(default="text", metadata={"help": "Column that holds the text."})
    streaming: bool = field(default=False, metadata={"help": "Read lazily; needs --max_steps."})
    datasets: list[dict] = field(
        default_factory=list,
        metadata={
            "help": "A mixture: list of sources with `path` and optionally `name`, `split`, `text_field`, `encoding`, "
            "`streaming` and `weight`, a share of the trained tokens."
        },
    )
    heldout_dataset: str | None = field(
        default=None, metadata={"help": "Hub dataset or local file to measure the held-out loss on."}
    )
    heldout_config: str | None = field(default=None, metadata={"help": "Configuration of a hub held-out dataset."})
    heldout_split: str | None = field(
        default=None, metadata={"help": "Its split; 'test' by default, all of files without splits in their names."}
    )
    max_heldout_rows: int = field(default=256, metadata={"help": "Rows of --max_length tokens to measure it on."})
    shuffle_buffer_size: int = field(
        default=1000, metadata={"help": "Documents held to shuffle a streaming source; 0 keeps its order."}
    )

    def __post_init__(self):
        if self.dataset_name and self.datasets:
            raise ValueError("Give either `dataset_name` or `datasets`, got both.")
        check_heldout_rows(self.max_heldout_rows)

    def sources(self) -> list[TextSource]:
        """The text sources to train on; empty for the embedded corpus."""
        if self.datasets:
            return [TextSource(**source) for source in self.datasets]
        if self.dataset_name is None:
            return []
        return [
            TextSource(
                self.dataset_name,
                self.dataset_config,
                self.dataset_split,
                self.streaming,
                self.dataset_encoding,
                self.text_field,
            )
        ]

    def heldout_source(self) -> TextSource | None:
        """The text to measure the held-out loss on; None where none is named."""
        if self.heldout_dataset is None:
            return None
        split = self.heldout_split or default_heldout_split(self.heldout_dataset, self.heldout_config)
        return TextSource(
            self.heldout_dataset,
            self.heldout_config,
            split,
            encoding=self.dataset_encoding,
            text_field=self.text_field,
        )


def check_heldout_rows(max_heldout_rows: int) -> None:
    """Raise ValueError unless there can be rows to measure the held-out loss on."""
    if max_heldout_rows < 1:
        raise ValueError(
            f"`max_heldout_rows` must be at least 1, got {max_heldout_rows}: to measure nothing, leave --heldout_dataset out."
        )
