"""The look at the rows before training: shown masks, and data that is refused."""

import io

import pytest
from datasets import Dataset, IterableDataset
from rich.console import Console
from support.tiny_tokenizers import byte_tokenizer

from parscale_adapt.data import check_rows, inspection, pack_dataset


END, BEGIN = 0, 1


def check(rows, tokenizer, **options):
    """Run the check and return what it printed."""
    dataset = rows if isinstance(rows, Dataset | IterableDataset) else Dataset.from_list(rows)
    console = Console(file=io.StringIO(), width=200, force_terminal=False)
    check_rows(dataset, tokenizer, console=console, **options)
    return console.file.getvalue()


def packed(*segments):
    return {"input_ids": [token for ids in segments for token in ids], "seq_lengths": [len(ids) for ids in segments]}


# ---- what is shown


def test_rows_are_printed_with_their_mask(tokenizer):
    rows = pack_dataset(Dataset.from_dict({"text": ["hello", "wörld"]}), tokenizer, 64)
    printed = check(rows, tokenizer)
    assert "⟦h⟧ello<|endoftext|>⟦w⟧örld<|endoftext|>" in printed
    assert "row 1: 13 tokens, 11 trained" in printed
    assert "1 rows checked" in printed


def test_prompt_is_marked_as_not_trained(tokenizer):
    prompt, answer = tokenizer("why?")["input_ids"], [*tokenizer("so")["input_ids"], END]
    row = {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
    assert "⟦why?⟧so<|endoftext|>" in check([row], tokenizer)


def test_only_the_first_rows_are_printed_and_long_ones_are_cut(tokenizer):
    rows = [packed([*[70] * 1000, END])] * 5
    printed = check(rows, tokenizer, num_rows=2)
    assert "row 2" in printed
    assert "row 3" not in printed
    assert "… 701 more tokens" in printed


def test_stream_is_checked_from_its_start(monkeypatch, tokenizer):
    rows = IterableDataset.from_generator(lambda: iter([packed([5, 6, END])] * 50))
    monkeypatch.setattr(inspection, "NUM_CHECKED_ROWS", 20)
    assert "20 rows checked" in check(rows, tokenizer)
    assert len(list(rows)) == 50


# ---- packed rows


def test_cut_documents_are_accepted(tokenizer):
    check([packed([5, END], [6, 7]), packed([7, 8, END])], tokenizer)
    check([packed([5, 6, 7])] * 3, tokenizer)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([packed([5, 6], [7, END])], "Row 1: a document lacks its end token '<|endoftext|>'"),
        ([packed([5, END], [6, END, END])], "Row 1: a document has the end token '<|endoftext|>' before its end"),
        ([packed([5, END, 6, END])], "before its end: the text holds it already, or boundaries are missing"),
        ([packed([5, END])] * 98 + [packed([END], [END])] * 2, "2 of the first 100 rows have no token to train on"),
        ([{"input_ids": [5, END], "seq_lengths": [1]}], "must sum to it, got [1]"),
        ([{"input_ids": [5, END]}], "Rows must have the columns `input_ids` and `seq_lengths` (packed) or `labels`"),
        ([{"text": "raw"}], "Rows must have the columns `input_ids`"),
    ],
)
def test_bad_packed_rows_are_refused(tokenizer, rows, message):
    with pytest.raises(ValueError, match=r"[Rr]ow") as raised:
        check(rows, tokenizer)
    assert message in str(raised.value)


def test_one_row_in_a_hundred_may_have_no_target(tokenizer):
    check([packed([5, END])] * 99 + [packed([END], [END])], tokenizer)


def test_empty_dataset_is_refused(tokenizer):
    with pytest.raises(ValueError, match="The dataset has no row"):
        check(IterableDataset.from_generator(lambda: iter([])), tokenizer)


def test_doubled_begin_token_is_refused():
    tokenizer = byte_tokenizer()
    check([packed([BEGIN, 5, END])], tokenizer)
    tokenizer.bos_token = "<|im_start|>"
    check([packed([BEGIN, 5, END])], tokenizer)
    with pytest.raises(ValueError, match=r"Row 1 begins with two BOS tokens \('<\|im_start\|>'\)"):
        check([packed([BEGIN, BEGIN, 5, END])], tokenizer)


# ---- rows prepared by TRL


def prepared(ids, num_masked=0):
    return {"input_ids": ids, "labels": [-100] * num_masked + ids[num_masked:]}


def test_good_trl_rows_pass(tokenizer):
    check([prepared([5, 6, 7, END])], tokenizer)
    check([prepared([5, 6, 7, END], num_masked=2)], tokenizer)
    # several turns, and a line break of the chat template after the end token
    turns = [5, END, 9, 6, 7, END, 9]
    check([{"input_ids": turns, "labels": [-100, END, -100, -100, 7, END, 9]}], tokenizer)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (prepared([5, 6, 7]), "is trained, so the model would not learn to stop"),
        (
            {"input_ids": [5, 6, END], "labels": [-100, 6, -100]},
            "is trained, so the model would not learn to stop",
        ),
        (prepared([5, 6, END, END]), "is doubled: the data or the chat template already has"),
        (prepared([5, 6, END], num_masked=3), "1 of the first 1 rows have no token to train on: check the loss mask"),
        ({"input_ids": [5, 6, END], "labels": [5, 6]}, "A row must have as many labels as tokens, got 2 and 3"),
    ],
)
def test_bad_trl_rows_are_refused(tokenizer, row, message):
    with pytest.raises(ValueError, match=r"[Rr]ow") as raised:
        check([row], tokenizer)
    assert message in str(raised.value)


def test_a_row_of_full_length_was_cut_and_any_other_was_not(tokenizer):
    check([prepared([5, 6, 7])], tokenizer, max_length=3)
    with pytest.raises(ValueError, match="Row 2: no end token such as"):
        check([prepared([5, 6, 7]), prepared([5, 6])], tokenizer, max_length=3)


def test_an_answer_may_end_with_another_token_at_which_generation_stops(tokenizer):
    check([prepared([5, 6, 2])], tokenizer, end_token_ids=[2])
