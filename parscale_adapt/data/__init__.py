"""Text in, packed and mixed training rows out."""

from .inspection import check_rows
from .mixture import build_train_dataset
from .packing import PackedCollator, PackedRow, iterate_packed_rows, pack_dataset, pack_documents
from .report import SourceReport, TokenReport
from .rows import LoadedSource
from .sources import TextSource, find_local_files, load_source
from .stdlib_corpus import corpus_fingerprint, load_stdlib_corpus
from .stdlib_docstrings import stdlib_docstring_pairs
from .tokenization import encode_documents
from .tokenizer_training import train_tokenizer


__all__ = [
    "LoadedSource",
    "PackedCollator",
    "PackedRow",
    "SourceReport",
    "TextSource",
    "TokenReport",
    "build_train_dataset",
    "check_rows",
    "corpus_fingerprint",
    "encode_documents",
    "find_local_files",
    "iterate_packed_rows",
    "load_source",
    "load_stdlib_corpus",
    "pack_dataset",
    "pack_documents",
    "stdlib_docstring_pairs",
    "train_tokenizer",
]
