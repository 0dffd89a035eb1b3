"""Preference pairs for the recipes that learn from them: from the hub, from local files, or made from docstrings."""

from collections.abc import Collection
from dataclasses import dataclass, field

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..data import (
    PreferenceSettings,
    TokenReport,
    prepare_preferences,
    set_chat_template,
    stdlib_preference_pairs,
)
from .arguments import BackboneArguments
from .checks import prepare_training
from .instructions import RowArguments, open_rows
from .stream_config import RecipeConfig
from .unused_options import refuse_unused_options


@dataclass
class PreferenceArguments(RowArguments):
    """Questions with a better and a worse answer each."""

    chosen_field: str = field(
        default="chosen",
        metadata={"help": "Column with the better answer, or a whole conversation that ends with it."},
    )
    rejected_field: str = field(
        default="rejected",
        metadata={"help": "Column with the worse answer, or a whole conversation that ends with it."},
    )


def prepare_preference_training(training: RecipeConfig, backbone: BackboneArguments, recipe: str) -> None:
    """Set what recipes on pairs need in TRL's arguments.

    Raises:
        ValueError: an option was given that would have no effect.
    """
    refuse_unused_options(training, recipe)
    training.include_num_input_tokens_seen = "non_padding"
    prepare_training(training, backbone)
    training.model_init_kwargs = None  # the model comes as an object


def load_preferences(
    data: PreferenceArguments,
    tokenizer: PreTrainedTokenizerBase,
    training: RecipeConfig,
    end_token_ids: Collection[int] = (),
) -> tuple[Dataset, Dataset | None, TokenReport]:
    """Training and held-out pairs as token ids, and what was read, trained and left out.

    The tokenizer gets a chat template.

    Args:
        data: where the pairs are.
        tokenizer: of the backbone.
        training: TRL's arguments.
        end_token_ids: tokens that end an answer, besides the tokenizer's end token.

    Raises:
        ValueError: a row can't be learned from; it is named, with what was found.
    """
    set_chat_template(tokenizer, data.chat_template)
    settings = PreferenceSettings(
        training.max_length,
        data.prompt_field,
        data.chosen_field,
        data.rejected_field,
        frozenset({tokenizer.eos_token_id, *end_token_ids}),
    )
    with PartialState().local_main_process_first():  # the others find its pairs in the cache
        train, train_name, heldout, heldout_name = open_rows(data, stdlib_preference_pairs)
        pairs, report = prepare_preferences(train, tokenizer, settings, train_name, training.dataset_num_proc)
        if heldout is None:
            return pairs, None, report
        heldout = heldout.select(range(min(len(heldout), data.max_heldout_rows)))
        return pairs, prepare_preferences(heldout, tokenizer, settings, f"held out: {heldout_name}")[0], report
