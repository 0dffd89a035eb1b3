"""Question and answer data for the SFT recipe: from the hub, from local files, or the embedded docstrings."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import ClassVar

from accelerate import PartialState
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig

from ..data import (
    TRAIN_ON,
    DataSource,
    InstructionSettings,
    TokenReport,
    default_heldout_split,
    load_rows,
    prepare_instructions,
    set_chat_template,
    stdlib_docstring_pairs,
)
from .arguments import BackboneArguments, check_heldout_rows
from .checks import prepare_training
from .stream_config import StreamDistillationConfig
from .unused_options import SFT, refuse_unused_options


@dataclass
class RowArguments:
    """Where rows for conversations are, and how they are shown to a model."""

    embedded_name: ClassVar[str] = "standard library"  # of the rows without a name
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub dataset, or local file, glob or folder (see docs/data.md). Without one, rows made from the Python "
            "standard library's docstrings."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_encoding: str = field(default="utf-8", metadata={"help": "Encoding of local text files."})
    heldout_dataset: str | None = field(default=None, metadata={"help": "Data to measure the held-out loss on."})
    heldout_config: str | None = field(default=None, metadata={"help": "Configuration of a hub held-out dataset."})
    heldout_split: str | None = field(
        default=None, metadata={"help": "Its split; 'test' by default, all of files without splits in their names."}
    )
    max_heldout_rows: int = field(default=256, metadata={"help": "Rows to measure it on."})
    prompt_field: str = field(default="prompt", metadata={"help": "Column with the question."})
    chat_template: str | None = field(
        default=None,
        metadata={"help": "File with a Jinja chat template; else the tokenizer's own, else ChatML."},
    )

    def __post_init__(self):
        check_heldout_rows(self.max_heldout_rows)
        if self.dataset_name is None:
            names = ("dataset_config", "heldout_dataset", "heldout_config", "heldout_split")
            given = [name for name in names if getattr(self, name) is not None]
            if given:
                raise ValueError(f"`{given[0]}` has no effect on the embedded data: name data with --dataset_name.")
        if self.heldout_dataset is None and (self.heldout_config or self.heldout_split):
            raise ValueError("`heldout_config` and `heldout_split` have no effect without --heldout_dataset: name it.")

    def sources(self) -> list[DataSource]:
        """What to train on; empty for the embedded data."""
        if self.dataset_name is None:
            return []
        return [DataSource(self.dataset_name, self.dataset_config, self.dataset_split, encoding=self.dataset_encoding)]

    def heldout_source(self) -> DataSource | None:
        """What to measure the held-out loss on; None where nothing is named."""
        if self.heldout_dataset is None:
            return None
        split = self.heldout_split or default_heldout_split(self.heldout_dataset, self.heldout_config)
        return DataSource(self.heldout_dataset, self.heldout_config, split, encoding=self.dataset_encoding)


@dataclass
class InstructionArguments(RowArguments):
    """Conversational or prompt/completion data."""

    completion_field: str = field(default="completion", metadata={"help": "Column with the answer."})
    train_on: str = field(
        default="last_answer",
        metadata={
            "help": "What is trained: last_answer of each row, all_answers, or all_text, questions included.",
            "choices": list(TRAIN_ON),
        },
    )


def prepare_instruction_training(training: SFTConfig, backbone: BackboneArguments) -> None:
    """Set what the SFT recipe needs in TRL's arguments.

    Raises:
        ValueError: an option was given that would have no effect.
    """
    refuse_unused_options(training, SFT)
    training.dataset_kwargs = {"skip_prepare_dataset": not training.packing}  # rows come as token ids and labels
    training.include_num_input_tokens_seen = "non_padding"
    prepare_training(training, backbone)


def load_instructions(
    data: InstructionArguments,
    tokenizer: PreTrainedTokenizerBase,
    training: SFTConfig | StreamDistillationConfig,
    end_token_ids: Collection[int] = (),
) -> tuple[Dataset, Dataset | None, TokenReport]:
    """Training and held-out rows as token ids and labels, and what was read, trained, cut and dropped.

    The tokenizer gets a chat template.

    Args:
        data: where the rows are, and what is trained of them.
        tokenizer: of the backbone.
        training: TRL's arguments.
        end_token_ids: tokens that end an answer, besides the tokenizer's end token.

    Raises:
        ValueError: a row can't be trained; it is named, with what was found.
    """
    set_chat_template(tokenizer, data.chat_template)
    settings = InstructionSettings(
        training.max_length,
        data.train_on,
        data.prompt_field,
        data.completion_field,
        keeps_end=getattr(training, "truncation_mode", None) == "keep_end",  # trainers that sample answers know none
        end_token_ids=frozenset({tokenizer.eos_token_id, *end_token_ids}),
    )
    with PartialState().local_main_process_first():  # the others find its rows in the cache
        train, train_name, heldout, heldout_name = open_rows(data, stdlib_docstring_pairs)
        rows, report = prepare_instructions(
            train, tokenizer, settings, train_name, getattr(training, "dataset_num_proc", None)
        )
        if training.shuffle_dataset:
            rows = rows.shuffle(seed=training.seed)
        if heldout is None:
            return rows, None, report
        heldout = heldout.select(range(min(len(heldout), data.max_heldout_rows)))
        return rows, prepare_instructions(heldout, tokenizer, settings, f"held out: {heldout_name}")[0], report


def open_rows(data: RowArguments, embedded: Callable[[], DatasetDict]) -> tuple[Dataset, str, Dataset | None, str]:
    """Training and held-out rows with their names, from what `data` names or from what `embedded` gives."""
    if not data.sources():
        pairs = embedded()
        return pairs["train"], data.embedded_name, pairs["heldout"], data.embedded_name
    (source,) = data.sources()
    heldout = data.heldout_source()
    return (
        load_rows(source),
        source.label,
        None if heldout is None else load_rows(heldout),
        "" if heldout is None else heldout.label,
    )
