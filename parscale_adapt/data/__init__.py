"""Text in, packed and mixed training rows out; questions and answers in, rows with a loss mask out."""

from .arithmetic import sums_of_digits
from .chat_template import CHATML
from .fingerprint import content_of, fingerprint_of_files
from .inspection import check_rows, show_prepared
from .instruction_rows import TRAIN_ON, InstructionSettings, RowPreparer
from .instructions import prepare_instructions
from .local_files import default_heldout_split, find_local_files
from .mixture import build_train_dataset
from .packing import PackedCollator, PackedRow, iterate_packed_rows, pack_dataset, pack_documents
from .preferences import PreferenceSettings, prepare_preferences, with_questions
from .prompts import PROMPT_FORMATS, PromptSettings, prepare_prompts
from .report import SourceReport, TokenReport
from .rows import LoadedSource, MixtureSettings
from .saying import say
from .sources import DataSource, TextSource, load_rows, load_source
from .stdlib_corpus import corpus_fingerprint, load_stdlib_corpus
from .stdlib_docstrings import stdlib_docstring_pairs, stdlib_preference_pairs
from .tokenization import encode_documents
from .tokenizer_training import train_tokenizer
from .tokenizers import TokenizerSettings, check_vocabulary, end_token_ids, load_tokenizer, set_chat_template


__all__ = [
    "CHATML",
    "PROMPT_FORMATS",
    "TRAIN_ON",
    "DataSource",
    "InstructionSettings",
    "LoadedSource",
    "MixtureSettings",
    "PackedCollator",
    "PackedRow",
    "PreferenceSettings",
    "PromptSettings",
    "RowPreparer",
    "SourceReport",
    "TextSource",
    "TokenReport",
    "TokenizerSettings",
    "build_train_dataset",
    "check_rows",
    "check_vocabulary",
    "content_of",
    "corpus_fingerprint",
    "default_heldout_split",
    "encode_documents",
    "end_token_ids",
    "find_local_files",
    "fingerprint_of_files",
    "iterate_packed_rows",
    "load_rows",
    "load_source",
    "load_stdlib_corpus",
    "load_tokenizer",
    "pack_dataset",
    "pack_documents",
    "prepare_instructions",
    "prepare_preferences",
    "prepare_prompts",
    "say",
    "set_chat_template",
    "show_prepared",
    "stdlib_docstring_pairs",
    "stdlib_preference_pairs",
    "sums_of_digits",
    "train_tokenizer",
    "with_questions",
]
