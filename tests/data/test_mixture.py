"""Mixtures: shares of trained tokens, deterministic order, honest counts."""

import io
import json
import random

import pytest
from datasets import Dataset, IterableDataset
from rich.console import Console
from torch.utils.data import DataLoader

from parscale_adapt.data import (
    LoadedSource,
    MixtureSettings,
    TextSource,
    TokenReport,
    build_train_dataset,
)


WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]


def make_texts(name, num_documents, num_words=20):
    generator = random.Random(name)
    return [
        f"{name}{index} " + " ".join(generator.choices(WORDS, k=generator.randrange(1, 2 * num_words)))
        for index in range(num_documents)
    ]


def source(name, num_documents, weight=None, streaming=False, num_words=20):
    dataset = Dataset.from_dict({"text": make_texts(name, num_documents, num_words)})
    return LoadedSource(name, dataset.to_iterable_dataset(num_shards=3) if streaming else dataset, weight)


def ids_of(dataset):
    return [tuple(row["input_ids"]) for row in dataset]


def recount(dataset, index):
    """Count tokens of one source from the rows alone."""
    rows = [row for row in dataset if row["source_index"] == index]
    return sum(len(row["input_ids"]) - len(row["seq_lengths"]) for row in rows)


# ---- one source


def test_one_epoch_holds_each_document_once_in_a_seeded_order(tokenizer):
    texts = make_texts("a", 50)
    built, report = build_train_dataset([source("a", 50)], tokenizer, MixtureSettings(8192, seed=1))
    documents = tokenizer.batch_decode([ids for row in built for ids in split(row)], skip_special_tokens=True)
    assert sorted(documents) == sorted(texts)
    assert documents != texts
    assert ids_of(build_train_dataset([source("a", 50)], tokenizer, MixtureSettings(8192, seed=1))[0]) == ids_of(built)
    assert ids_of(build_train_dataset([source("a", 50)], tokenizer, MixtureSettings(8192, seed=2))[0]) != ids_of(built)
    num_tokens = sum(len(ids) + 1 for ids in tokenizer(texts)["input_ids"])
    (counts,) = report.sources
    assert (counts.documents, counts.tokens_read, counts.tokens_dropped, counts.epochs) == (50, num_tokens, 0, 1)
    assert counts.tokens_trained == num_tokens - 50 == recount(built, 0)


def split(row):
    start = 0
    for length in row["seq_lengths"]:
        yield row["input_ids"][start : start + length]
        start += length


def test_partial_row_is_kept_by_default_and_counted_when_dropped(tokenizer):
    kept, report_kept = build_train_dataset([source("a", 50)], tokenizer, MixtureSettings(64, seed=1))
    lengths = [len(row["input_ids"]) for row in kept]
    assert sorted(set(lengths), reverse=True)[0] == 64
    assert sum(length < 64 for length in lengths) == 1
    full, report_full = build_train_dataset(
        [source("a", 50)], tokenizer, MixtureSettings(64, seed=1, drop_partial_rows=True)
    )
    assert len(full) == len(kept) - 1
    (all_of_it,), (rest,) = report_kept.sources, report_full.sources
    assert rest.tokens_dropped > 0
    assert (rest.tokens_read, rest.documents) == (all_of_it.tokens_read, all_of_it.documents)
    assert rest.tokens_trained == recount(full, 0) < all_of_it.tokens_trained


def test_epochs_are_laid_out_in_new_orders_and_cut_at_max_rows(tokenizer):
    one, _ = build_train_dataset([source("a", 50)], tokenizer, MixtureSettings(64, seed=1))
    two, report = build_train_dataset([source("a", 50)], tokenizer, MixtureSettings(64, seed=1, num_epochs=2))
    assert ids_of(two)[: len(one)] == ids_of(one)
    assert ids_of(two)[len(one) :] != ids_of(one)
    assert report.sources[0].epochs == 2
    cut, report = build_train_dataset([source("a", 50)], tokenizer, MixtureSettings(64, seed=1, max_rows=len(one) + 3))
    assert ids_of(cut) == ids_of(two)[: len(one) + 3]
    assert report.num_tokens_trained == recount(cut, 0)


# ---- mixtures


def test_without_weights_sources_are_put_together_and_shuffled_by_row(tokenizer):
    built, report = build_train_dataset([source("a", 60), source("b", 60)], tokenizer, MixtureSettings(64, seed=1))
    order = [row["source_index"] for row in built]
    assert order != sorted(order)
    assert [counts.epochs for counts in report.sources] == [1, 1]
    assert [counts.documents for counts in report.sources] == [60, 60]
    assert [counts.wanted_share for counts in report.sources] == [None, None]
    # a source is used up at its last row, so one row less means one source less
    _, report = build_train_dataset(
        [source("a", 60), source("b", 60)], tokenizer, MixtureSettings(64, seed=1, max_rows=len(built) - 1)
    )
    assert sorted(counts.epochs for counts in report.sources) == [0, 1]
    _, report = build_train_dataset(
        [source("a", 60), source("b", 60)], tokenizer, MixtureSettings(64, seed=1, max_rows=len(built) // 2)
    )
    assert [counts.epochs for counts in report.sources] == [0, 0]


@pytest.mark.parametrize("streaming", [False, True])
def test_weights_are_shares_of_trained_tokens(tokenizer, streaming):
    """Reached within 1% after a million tokens, with documents of very different lengths."""
    sources = [
        source("short", 300, 3, num_words=2, streaming=streaming),
        source("long", 40, 6, num_words=200),
        source("mid", 80, 1, num_words=30, streaming=streaming),
    ]
    built, report = build_train_dataset(sources, tokenizer, MixtureSettings(512, seed=0, max_rows=2000))
    trained = [0, 0, 0]
    for row in built:
        trained[row["source_index"]] += row["num_tokens_trained"]
    assert sum(trained) > 950_000
    for done, wanted, counts in zip(trained, (0.3, 0.6, 0.1), report.sources):
        assert done / sum(trained) == pytest.approx(wanted, abs=0.01)
        assert counts.share == pytest.approx(done / sum(trained))
        assert counts.tokens_trained == done
        assert counts.wanted_share == pytest.approx(wanted)
        assert counts.epochs > 1


def test_shares_hold_all_along_not_only_at_the_end(tokenizer):
    sources = [source("a", 200, 0.7, num_words=40), source("b", 200, 0.3, num_words=5)]
    built, _ = build_train_dataset(sources, tokenizer, MixtureSettings(128, seed=0, max_rows=400))
    trained = [0, 0]
    for row in built:
        trained[row["source_index"]] += row["num_tokens_trained"]
        assert abs(trained[0] - 0.7 * sum(trained)) <= 128


def test_weighted_epoch_ends_when_every_source_was_used_completely(tokenizer):
    built, report = build_train_dataset(
        [source("small", 10, 1), source("big", 80, 1)], tokenizer, MixtureSettings(64, seed=0)
    )
    small, big = report.sources
    assert big.epochs == 1
    assert big.documents == 80
    assert small.epochs > 3
    assert built[len(built) - 1]["source_index"] == 1
    assert built[len(built) - 1]["ends_epoch"]
    # a new order in each epoch of the repeated source
    rows = [tuple(row["input_ids"]) for row in built if row["source_index"] == 0]
    assert len(set(rows)) > 0.9 * len(rows)


def test_bad_weights_and_numbers_are_refused(tokenizer):
    def build(sources, max_length=64, **options):
        return build_train_dataset(sources, tokenizer, MixtureSettings(max_length, **{"seed": 0, **options}))

    with pytest.raises(ValueError, match="No data source was given"):
        build([])
    with pytest.raises(ValueError, match=r"`weight` must be given for every source or for none, got \[1, None\]"):
        build([source("a", 2, 1), source("b", 2)])
    with pytest.raises(ValueError, match=r"Several sources of which one streams \(a, b\) must have a `weight` each"):
        build([source("a", 3), source("b", 3, streaming=True)])
    with pytest.raises(ValueError, match="The `weight` of a must be a finite number above 0, got 0"):
        source("a", 2, 0)
    with pytest.raises(ValueError, match="b must have a column `text`, got body"):
        LoadedSource("b", Dataset.from_dict({"body": ["a"]}))
    with pytest.raises(ValueError, match="c is empty"):
        LoadedSource("c", Dataset.from_dict({"text": []}))
    with pytest.raises(ValueError, match="`max_length` must be"):
        build([source("a", 2)], max_length=1)
    for option in ("num_epochs", "max_rows", "shuffle_buffer_size", "seed"):
        with pytest.raises(ValueError, match=f"`{option}` must be a whole number of at least"):
            build([source("a", 2)], **{option: -1})


@pytest.mark.parametrize("weight", [None, 1.0])
def test_source_with_nothing_to_train_on_is_refused(tokenizer, weight):
    empty = LoadedSource("void", Dataset.from_dict({"text": ["", ""]}), weight)
    with pytest.raises(ValueError, match="void has nothing to train on"):
        build_train_dataset([empty, source("a", 5, weight)], tokenizer, MixtureSettings(64, seed=0))


# ---- streams


def test_stream_is_endless_and_restarts_the_same(tokenizer):
    built, report = build_train_dataset([source("a", 20, streaming=True)], tokenizer, MixtureSettings(64, seed=0))
    assert isinstance(built, IterableDataset)
    assert report.num_tokens_trained == 0
    first = ids_of(built.take(100))
    assert report.sources[0].epochs > 1
    counted = report.to_dict()
    assert ids_of(built.take(100)) == first
    assert report.to_dict() == counted


def test_shuffle_buffer_changes_the_order_of_each_epoch_but_not_the_documents(tokenizer):
    def one_epoch(**options):
        built, report = build_train_dataset(
            [source("a", 40, streaming=True)], tokenizer, MixtureSettings(10_000, seed=0, num_epochs=2, **options)
        )
        rows = list(built)
        assert report.sources[0].epochs == 2
        return [sorted(map(tuple, split(row))) for row in rows], [list(split(row)) for row in rows]

    sets, plain = one_epoch()
    shuffled_sets, shuffled = one_epoch(shuffle_buffer_size=10)
    assert sets == shuffled_sets
    assert plain[0] == plain[1]
    assert shuffled[0] != shuffled[1]
    assert shuffled[0] != plain[0]
    assert one_epoch(shuffle_buffer_size=10)[1] == shuffled


def test_stream_from_files_equals_itself_in_every_worker_setting(tokenizer, tmp_path):
    """A DataLoader with workers sees the same rows, none missing, and fills the same report."""
    for index in range(4):
        lines = [json.dumps({"text": text}) for text in make_texts(f"f{index}-", 15)]
        (tmp_path / f"{index}.jsonl").write_text("\n".join(lines))

    def rows(num_workers):
        sources = [TextSource(str(tmp_path), streaming=True, weight=2), source("b", 20, 1)]
        built, report = build_train_dataset(
            sources, tokenizer, MixtureSettings(128, seed=3, max_rows=160, shuffle_buffer_size=16)
        )
        loader = DataLoader(built, batch_size=4, num_workers=num_workers, collate_fn=lambda batch: batch)
        return [tuple(row["input_ids"]) for batch in loader for row in batch], report.to_dict()

    alone, with_workers = rows(0), rows(2)
    assert alone == with_workers
    assert len(alone[0]) == 160
    counts = alone[1]["sources"][0]
    assert counts["epochs"] >= 1
    assert counts["documents"] >= 60


# ---- report


def test_report_prints_and_turns_into_json(tokenizer):
    _, report = build_train_dataset(
        [source("left", 30, 1), source("right", 30, 3)], tokenizer, MixtureSettings(64, seed=0)
    )
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report.table())
    text = console.export_text()
    assert "left" in text
    assert "75.0%" in text
    assert f"{report.sources[1].tokens_read:,}" in text
    assert json.loads(json.dumps(report.to_dict()))["sources"][0]["name"] == "left"


def test_report_counts_what_it_is_given():
    report = TokenReport(["a", "b"])
    row = {"source_index": 1, "num_documents": 2, "num_tokens_read": 9, "num_tokens_trained": 7, "ends_epoch": True}
    report.add_row(row)
    report.add_dropped(1, 1, 4)
    a, b = report.sources
    assert (a.documents, a.tokens_read, a.share) == (0, 0, 0.0)
    assert (b.documents, b.tokens_read, b.tokens_trained, b.tokens_dropped, b.epochs) == (3, 13, 7, 4, 1)
    report.reset()
    assert report.num_tokens_trained == 0
