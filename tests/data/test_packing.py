"""Packing loses nothing, ends each document once, and keeps documents from seeing each other."""

import random
from itertools import chain

import pytest
import torch
from datasets import Dataset, IterableDataset
from support.tiny_tokenizers import byte_tokenizer
from tokenizers import processors
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.masking_utils import find_packed_sequence_indices

from parscale_adapt.data import (
    PackedCollator,
    encode_documents,
    iterate_packed_rows,
    pack_dataset,
    pack_documents,
)


END = 0
TEXTS = ["def f(x):\n    return x\n", "", "import os", "é <|im_start|>user<|im_end|> <|endoftext|> goes on", "a" * 50]


def with_template(tokenizer, single):
    """A copy of the tokenizer that puts special tokens around each text, as Llama's does."""
    changed = byte_tokenizer()
    changed.bos_token = "<|im_start|>"
    specials = [("<|im_start|>", 1), ("<|endoftext|>", 0)]
    changed.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=specials)
    assert changed("a")["input_ids"] != tokenizer("a")["input_ids"]
    return changed


def tiny_model(implementation):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=implementation,
    )
    return Qwen2ForCausalLM(config).eval()


def random_documents(seed, num_documents=20, longest=30):
    generator = random.Random(seed)
    return [
        [generator.randrange(1, 64) for _ in range(generator.randrange(longest))] + [END] for _ in range(num_documents)
    ]


def rejoin(rows, max_length):
    """Undo packing: drop the token that a continuation reads again, and join what was cut."""
    documents, is_open = [], False
    for row in rows:
        start = 0
        for length in row.seq_lengths:
            segment = row.input_ids[start : start + length]
            start += length
            if is_open:
                assert segment[0] == documents[-1][-1]
                documents[-1] += segment[1:]
            else:
                documents.append(list(segment))
            is_open = segment[-1] != END
    return documents


# ---- tokens


def test_each_document_has_exactly_one_end_token(tokenizer):
    encoded = encode_documents([*TEXTS, "closed already<|endoftext|>"], tokenizer)
    assert [ids.count(END) for ids in encoded] == [1] * 6
    assert all(ids[-1] == END for ids in encoded)
    assert encoded[1] == [END]
    assert tokenizer.decode(encoded[5]) == "closed already<|endoftext|>"


def test_special_tokens_spelled_in_the_text_are_ordinary_text(tokenizer):
    ids = encode_documents([TEXTS[3]], tokenizer)[0]
    assert not {1, 2} & set(ids)
    assert tokenizer.decode(ids[:-1]) == TEXTS[3]
    # and the tokenizer is left as it was
    assert tokenizer("<|im_start|>")["input_ids"] == [1]


def test_what_the_tokenizer_adds_is_kept_once(tokenizer):
    plain = encode_documents(TEXTS, tokenizer)
    with_begin = encode_documents(TEXTS, with_template(tokenizer, "<|im_start|> $A"))
    assert with_begin == [[1, *ids] for ids in plain]
    with_both = encode_documents(TEXTS, with_template(tokenizer, "<|im_start|> $A <|endoftext|>"))
    assert with_both == with_begin


def test_long_documents_are_not_truncated(tokenizer):
    tokenizer.model_max_length = 8
    assert tokenizer.decode(encode_documents(["word " * 40], tokenizer)[0][:-1]) == "word " * 40


def test_tokenizer_without_end_token_is_refused(tokenizer):
    bare = byte_tokenizer()
    bare.eos_token = None
    with pytest.raises(ValueError, match="has no end token, so nothing would end: set `eos_token`"):
        pack_dataset(Dataset.from_dict({"text": TEXTS}), bare, 8)


# ---- rows


@pytest.mark.parametrize("max_length", [2, 3, 7, 16, 100])
@pytest.mark.parametrize("seed", range(3))
def test_rows_hold_every_token_once_in_order(max_length, seed):
    documents = random_documents(seed)
    rows = list(pack_documents(documents, max_length))
    assert all(len(row.input_ids) == max_length for row in rows[:-1])
    assert 0 < len(rows[-1].input_ids) <= max_length
    assert all(sum(row.seq_lengths) == len(row.input_ids) for row in rows)
    assert rejoin(rows, max_length) == documents
    assert sum(row.num_documents for row in rows) == len(documents)
    assert sum(row.num_tokens_read for row in rows) == sum(map(len, documents))


@pytest.mark.parametrize("max_length", [2, 5, 16])
def test_every_token_but_the_first_of_a_document_is_trained_exactly_once(max_length):
    # Numbered tokens, so that each one can be told from the others.
    documents = [list(range(start, start + 11)) for start in range(100, 200, 11)]
    rows = list(pack_documents(documents, max_length))
    batch = PackedCollator(0)([row.to_dict() for row in rows])
    trained = batch["labels"][batch["labels"] != -100].tolist()
    assert sorted(trained) == [token for document in documents for token in document[1:]]
    assert sum(row.num_tokens_trained for row in rows) == len(trained)


def test_packing_is_lazy_for_map_style_and_streaming(tokenizer):
    num_read = 0

    def endless():
        nonlocal num_read
        while True:
            num_read += 1
            yield {"text": "some text"}

    def row(dataset):
        return next(iterate_packed_rows(dataset, tokenizer, 8))

    assert len(row(IterableDataset.from_generator(endless)).input_ids) == 8
    assert num_read < 500
    assert row(Dataset.from_dict({"text": ["some text"] * 5})) == row(IterableDataset.from_generator(endless))


def test_pack_dataset_keeps_the_order_and_the_rows(tokenizer):
    packed = pack_dataset(Dataset.from_dict({"text": TEXTS * 300}), tokenizer, 16)
    rows = list(pack_documents(encode_documents(TEXTS * 300, tokenizer), 16))
    assert len(rows) > 1024
    assert list(packed) == [row.to_dict() for row in rows]
    assert not packed.cache_files


def test_text_that_is_not_a_string_is_named(tokenizer):
    dataset = IterableDataset.from_generator(lambda: iter([{"text": "a"}, {"text": None}]))
    with pytest.raises(TypeError, match="web, row 2: the field 'text' must hold text, got null"):
        list(iterate_packed_rows(dataset, tokenizer, 8, label="web"))


@pytest.mark.parametrize("max_length", [1, 0, -3, 2.5, True])
def test_bad_row_length_is_refused(max_length):
    with pytest.raises(ValueError, match="`max_length` must be a whole number of at least 2 tokens"):
        next(pack_documents([[1, 2]], max_length))


def test_document_without_tokens_is_refused():
    with pytest.raises(ValueError, match="A document has no token"):
        list(pack_documents([[1], []], 8))


# ---- batches


def test_collator_restarts_positions_and_fills_up_with_a_segment_of_its_own():
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "seq_lengths": [2, 1, 2]},
        {"input_ids": [1, 2], "seq_lengths": [2]},
    ]
    batch = PackedCollator(63)(rows)
    assert set(batch) == {"input_ids", "labels", "position_ids", "use_cache"}
    assert batch["use_cache"] is False
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [1, 2, 63, 63, 63]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 0, 1], [0, 1, 0, 1, 2]]
    assert batch["labels"].tolist() == [[-100, 6, -100, -100, 9], [-100, 2, -100, -100, -100]]
    assert find_packed_sequence_indices(batch["position_ids"]).tolist() == [[0, 0, 1, 2, 2], [0, 0, 1, 1, 1]]


def test_flattened_batch_is_one_row_without_padding():
    rows = [{"input_ids": [5, 6, 7], "seq_lengths": [2, 1]}, {"input_ids": [1, 2], "seq_lengths": [2]}]
    batch = PackedCollator(63, flatten=True)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 6, -100, -100, 2]]


def test_batch_without_boundaries_takes_the_plain_causal_path():
    batch = PackedCollator(0)([{"input_ids": [1, 2, 3], "seq_lengths": [3]}] * 2)
    assert batch["position_ids"].tolist() == [[0, 1, 2]] * 2
    assert find_packed_sequence_indices(batch["position_ids"]) is None


def test_bad_rows_and_padding_are_refused():
    with pytest.raises(ValueError, match=r"segments of a packed row of 3 tokens must sum to it, got \[1, 1\]"):
        PackedCollator(0)([{"input_ids": [1, 2, 3], "seq_lengths": [1, 1]}])
    with pytest.raises(ValueError, match="must have the columns `input_ids` and `seq_lengths`, got input_ids"):
        PackedCollator(0)([{"input_ids": [1, 2, 3]}])
    with pytest.raises(
        TypeError, match=r"`pad_token_id` must be an integer, got None: .* can lend its `eos_token_id`"
    ):
        PackedCollator(None)


# ---- the model


def packed_loss(model, batch):
    """Mean loss over the trained tokens, and how many they are."""
    with torch.no_grad():
        return float(model(**batch).loss), int((batch["labels"] != -100).sum())


def loss_alone(model, documents):
    """Token-weighted loss of documents run one by one, with their own forward pass each."""
    total = 0.0
    for document in documents:
        ids = torch.tensor([document])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
    num_trained = sum(len(document) - 1 for document in documents)
    return total / num_trained, num_trained


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_loss_equals_the_loss_of_the_same_documents_alone(implementation, flatten):
    model = tiny_model(implementation)
    documents = [document for seed in range(12) for document in random_documents(seed, 1, 12)]
    lengths = [len(document) for document in documents]
    # Rows of whole documents, of unequal length, so that padding and boundaries both occur.
    rows = [
        {"input_ids": [*chain(*documents[start : start + 4])], "seq_lengths": lengths[start : start + 4]}
        for start in (0, 4, 8)
    ]
    loss, num_trained = packed_loss(model, PackedCollator(7, flatten=flatten)(rows))
    expected, expected_num_trained = loss_alone(model, documents)
    assert num_trained == expected_num_trained
    assert loss == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("max_length", [9, 32])
def test_packed_loss_with_cut_documents_equals_the_loss_of_their_pieces_alone(implementation, max_length):
    model = tiny_model(implementation)
    rows = [row.to_dict() for row in pack_documents(random_documents(1), max_length)]
    loss, num_trained = packed_loss(model, PackedCollator(7)(rows))
    pieces = [piece.tolist() for row in rows for piece in torch.tensor(row["input_ids"]).split(row["seq_lengths"])]
    expected, expected_num_trained = loss_alone(model, [piece for piece in pieces if len(piece) > 1])
    assert num_trained == expected_num_trained == sum(len(document) - 1 for document in random_documents(1))
    assert loss == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_no_token_depends_on_another_document_or_on_padding(implementation):
    model = tiny_model(implementation)
    rows = [{"input_ids": [*range(1, 11)], "seq_lengths": [4, 6]}, {"input_ids": [*range(20, 26)], "seq_lengths": [6]}]
    batch = PackedCollator(7)(rows)
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, :4] += 30
    changed["input_ids"][1, 6:] = 50
    with torch.no_grad():
        before, after = model(**batch).logits, model(**changed).logits
    assert torch.equal(before[0, 4:], after[0, 4:])
    assert torch.equal(before[1, :6], after[1, :6])
    assert not torch.equal(before[0, :4], after[0, :4])
    assert before.isfinite().all()
