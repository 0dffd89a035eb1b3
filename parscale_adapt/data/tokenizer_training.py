"""A byte-level BPE tokenizer trained on the spot, in the form that Qwen2 models load."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX


END_TOKEN = "<|endoftext|>"
# Qwen2's tokenizer class appends <|endoftext|> under a new id, beyond the model's embeddings, unless it is there.
SPECIAL_TOKENS = (END_TOKEN, "<|im_start|>", "<|im_end|>")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on texts; the same texts give the same tokenizer.

    It normalises and splits text as Qwen2 does, so that a saved copy gives the same ids when `AutoTokenizer` opens it
    beside a Qwen2 model.

    Args:
        texts: the training split only, or held-out text shapes the vocabulary.
        vocab_size: tokens in all: 256 bytes, the 3 special tokens, merges.

    Returns:
        A tokenizer whose end and padding token is ``<|endoftext|>``; ``<|im_start|>`` and ``<|im_end|>`` are special.

    Raises:
        ValueError: `vocab_size` leaves no merge, or the texts are too small for it.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"`vocab_size` must be at least {smallest} (bytes and special tokens), got {vocab_size}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"The texts give only {tokenizer.get_vocab_size()} tokens, not {vocab_size}: use more text or a smaller "
            "`vocab_size`."
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_TOKEN,
        pad_token=END_TOKEN,
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
    )
