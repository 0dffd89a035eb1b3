"""Question and answer data for the SFT recipe: from the hub, from local files, or the embedded docstrings."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig

from ..data import find_local_files, stdlib_docstring_pairs
from .arguments import BackboneArguments
from .checks import prepare_training


# ChatML, but with the tokenizer's own end token, at which generation stops.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass
class InstructionArguments:
    """Conversational or prompt/completion data."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub dataset, or local .jsonl, .json or .parquet file. Without one, questions and answers made "
            "from the Python standard library's docstrings."
        },
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of a hub dataset to train on."})
    heldout_dataset: str | None = field(default=None, metadata={"help": "Data to measure the held-out loss on."})
    heldout_split: str = field(default="test", metadata={"help": "Split of a hub held-out dataset."})
    max_heldout_rows: int = field(default=256, metadata={"help": "Rows to measure it on."})
    prompt_field: str = field(default="prompt", metadata={"help": "Column with the question."})
    completion_field: str = field(default="completion", metadata={"help": "Column with the answer."})
    chat_template: str | None = field(
        default=None,
        metadata={"help": "File with a Jinja chat template; else the tokenizer's own, else ChatML."},
    )

    def sources(self) -> list:
        """Named sources, for the run's identity; empty for the embedded data."""
        return [_Named(self.dataset_name)] if self.dataset_name else []


@dataclass(frozen=True)
class _Named:
    path: str


def prepare_instruction_training(training: SFTConfig, backbone: BackboneArguments) -> None:
    """Set what the SFT recipe needs in TRL's arguments: the loss is on the answer only."""
    training.completion_only_loss = True
    training.include_num_input_tokens_seen = "non_padding"
    prepare_training(training, backbone)


def load_instructions(
    data: InstructionArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, Dataset | None]:
    """Training and held-out rows with `prompt` and `completion` as lists of messages, and a tokenizer that has a
    chat template.

    Raises:
        ValueError: the data has neither `messages` nor the named columns, or is empty.
    """
    if data.chat_template is not None:
        tokenizer.chat_template = Path(data.chat_template).read_text()
    elif tokenizer.chat_template is None:
        tokenizer.chat_template = CHATML
    if data.dataset_name is None:
        pairs = stdlib_docstring_pairs()
        train, heldout = pairs["train"], pairs["heldout"]
    else:
        train = _load(data.dataset_name, data.dataset_split)
        heldout = _load(data.heldout_dataset, data.heldout_split) if data.heldout_dataset else None
    train = _as_conversations(train, data)
    if heldout is not None:
        heldout = _as_conversations(heldout.select(range(min(len(heldout), data.max_heldout_rows))), data)
    return train, heldout


def _load(name: str, split: str) -> Dataset:
    files = find_local_files(name)
    builder = name
    options: dict[str, Any] = {"split": split}
    if files is not None:
        suffix = Path(files[0]).suffix
        if suffix not in _BUILDERS:
            raise ValueError(f"{files[0]}: instruction data is read from {', '.join(_BUILDERS)} files.")
        if all(Path(file).stat().st_size == 0 for file in files):
            raise ValueError(f"{name} is empty; instruction tuning needs at least one row.")
        builder, options = _BUILDERS[suffix], {"split": "train", "data_files": files}
    try:
        dataset = load_dataset(builder, **options)
    except DatasetsError as error:
        raise ValueError(f"{name} can't be read: {error.__cause__ or error}") from error
    if len(dataset) == 0:
        raise ValueError(f"{name} has no rows in split {split!r}; instruction tuning needs at least one.")
    return dataset


def _as_conversations(dataset: Dataset, data: InstructionArguments) -> Dataset:
    columns = dataset.column_names
    if "messages" in columns:
        return dataset.map(_split_last_answer, remove_columns=columns, desc="Splitting off the answers")
    missing = [name for name in (data.prompt_field, data.completion_field) if name not in columns]
    if missing:
        raise ValueError(
            f"The data needs a column `messages`, or `{data.prompt_field}` and `{data.completion_field}`; it has "
            f"{', '.join(columns)}. Name others with --prompt_field and --completion_field."
        )

    def convert(row: dict) -> dict:
        prompt, completion = row[data.prompt_field], row[data.completion_field]
        if isinstance(prompt, list) and isinstance(completion, list):
            return {"prompt": prompt, "completion": completion}
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise ValueError(
                f"Each row needs text, or lists of messages, in `{data.prompt_field}` and `{data.completion_field}`; "
                f"found {prompt!r} and {completion!r}."
            )
        return {
            "prompt": [{"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": completion}],
        }

    return dataset.map(convert, remove_columns=columns, desc="Making conversations")


def _split_last_answer(row: dict) -> dict:
    messages = row["messages"]
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError(f"Each row of `messages` must end with an answer of the assistant, found {messages[-1:]}.")
    return {"prompt": messages[:-1], "completion": messages[-1:]}
