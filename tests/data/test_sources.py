"""Raw text from local files: what is read, and one clear sentence for what cannot be."""

import json
import socket

import datasets
import huggingface_hub
import pytest

from parscale_adapt.data import DataSource, TextSource, find_local_files, load_rows, load_source
from parscale_adapt.data.local_files import find_local


TEXTS = ["first document\nwith two lines", "second", "third é"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """Refuse every connection, and keep Arrow copies out of the user's cache."""

    def refuse(*args, **kwargs):
        raise AssertionError("local data must not reach for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # The refusal has to come from the code under test, not from the offline switch of the test session.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_all_kinds(folder):
    rows = [{"text": text, "other": 1} for text in TEXTS]
    write_jsonl(folder / "a.jsonl", rows)
    (folder / "a.json").write_text(json.dumps(rows))
    datasets.Dataset.from_list(rows).to_parquet(folder / "a.parquet")
    for index, text in enumerate(TEXTS):
        (folder / f"{index}.txt").write_text(text)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("pattern", ["a.jsonl", "a.json", "a.parquet", "*.txt", "[0-2].txt"])
def test_every_kind_of_file_gives_the_same_text_column(tmp_path, pattern, streaming):
    write_all_kinds(tmp_path)
    dataset = load_source(TextSource(str(tmp_path / pattern), streaming=streaming))
    assert isinstance(dataset, datasets.IterableDataset) is streaming
    assert list(dataset) == [{"text": text} for text in TEXTS]


def test_folder_is_read_in_order_of_names_and_other_files_are_left_alone(tmp_path):
    (tmp_path / "sub").mkdir()
    write_jsonl(tmp_path / "sub" / "b.jsonl", [{"text": "b"}])
    write_jsonl(tmp_path / "a[1].jsonl", [{"text": "a"}])
    (tmp_path / "README.md").write_text("not data")
    assert load_source(TextSource(str(tmp_path)))["text"][:] == ["a", "b"]


def test_other_text_field_becomes_text(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"content": "hello", "text": "not this"}])
    for streaming in (False, True):
        assert list(load_source(TextSource(path, text_field="content", streaming=streaming))) == [{"text": "hello"}]


def test_split_of_local_files_can_be_sliced(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    assert load_source(TextSource(path, split="train[1:]"))["text"][:] == TEXTS[1:]


@pytest.mark.parametrize("name", ["owner/name", "wikitext", "owner/data.v1"])
def test_hub_names_are_not_taken_for_files(name):
    assert find_local_files(name) is None


@pytest.mark.parametrize("path", ["missing.jsonl", "./missing", "/missing/folder", "data/missing.csv", "a b/c"])
def test_missing_things_are_named_before_anything_is_read(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"missing.* does not exist; looked from|a b/c is neither an existing file"):
        load_source(TextSource(path))


def test_an_empty_folder_names_what_is_read(tmp_path):
    with pytest.raises(
        ValueError, match=r"holds no \.jsonl, \.ndjson, \.json, \.csv, \.tsv, \.txt, \.parquet or \.arrow file"
    ):
        load_source(TextSource(str(tmp_path)))


def test_an_empty_path_is_refused():
    with pytest.raises(
        ValueError, match=r"`path` must be the name of a hub dataset, a file, glob or folder, got ''\."
    ):
        TextSource("")


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), "1", True])
def test_bad_weights_are_refused(weight):
    with pytest.raises(ValueError, match="The `weight` of owner/name must be a finite number above 0"):
        TextSource("owner/name", weight=weight)


# ---- exactly what was written


def test_no_type_is_guessed(tmp_path):
    """Arrow's readers make dates of the one and floats of the other, and pandas makes nothing of NA."""
    rows = [{"text": "2024-05-01", "n": 1}, {"text": "2024-05-02", "n": "x"}, {"text": "NA", "n": None}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    assert load_source(TextSource(path))["text"][:] == ["2024-05-01", "2024-05-02", "NA"]
    assert [json.loads(row) for row in load_rows(DataSource(path))["row"]] == rows


def test_rows_keep_the_fields_that_they_have(tmp_path):
    rows = [{"tools": [{"a": 1}]}, {"tools": [{"b": {"c": None}}]}]
    table = load_rows(DataSource(write_jsonl(tmp_path / "a.jsonl", rows)))
    assert [json.loads(row) for row in table["row"]] == rows
    assert [place.rpartition("/")[2] for place in table["place"]] == ["a.jsonl, line 1", "a.jsonl, line 2"]


def test_a_line_may_hold_other_breaks_than_its_own(tmp_path):
    text = "one\u2028two\x85three\rfour"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\r\n\n", newline="")
    assert load_source(TextSource(str(tmp_path / "a.jsonl")))["text"][:] == [text]


def test_a_file_that_changed_is_read_again(tmp_path):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"text": "before"}])
    assert load_source(TextSource(str(path)))["text"][:] == ["before"]
    write_jsonl(path, [{"text": "behind"}])
    assert load_source(TextSource(str(path)))["text"][:] == ["behind"]


def test_a_broken_line_ends_a_stream_where_it_stands(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    stream = iter(load_source(TextSource(str(tmp_path / "a.jsonl"), streaming=True)))
    assert next(stream) == {"text": "a"}
    with pytest.raises(ValueError, match="line 2: the field 'text' must hold text, got int"):
        next(stream)


# ---- splits


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("Training-set.csv", "train"),
        ("my_dev.json", "validation"),
        ("valid/part.0.jsonl", "validation"),
        ("held-out.jsonl", "heldout"),
        ("data/eval/1.parquet", "test"),
        ("train_test_split.jsonl", "train"),
        ("test/train_routes.jsonl", "test"),
        ("eval_data/train.jsonl", "train"),
        ("data/train_gen-00000-of-00002-abc.parquet", "train_gen"),
        ("c4-train.00000-of-01024.json.gz", "train"),
        ("contest.jsonl", None),
        ("latest/trained.jsonl", None),
    ],
)
def test_the_split_that_a_name_speaks_of(tmp_path, name, split):
    for file in ("others/plain.jsonl", name):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    found = find_local(str(tmp_path))
    assert [str(tmp_path / name)] == found.splits.get(split) or (split is None and len(found.splits[None]) == 2)


def test_names_of_folders_above_say_nothing(tmp_path):
    folder = tmp_path / "test" / "train"
    folder.mkdir(parents=True)
    path = write_jsonl(folder / "a.jsonl", [{"text": "a"}])
    write_jsonl(folder / "b.jsonl", [{"text": "b"}])
    for pattern in (folder, folder / "*.jsonl", folder / "[ab].jsonl"):
        assert load_source(TextSource(str(pattern)))["text"][:] == ["a", "b"]
    assert load_source(TextSource(path))["text"][:] == ["a"]


def test_hidden_and_foreign_files_of_a_clone_are_left_alone(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    for name in (".git/objects/x.jsonl", "__pycache__/y.json", "dataset_infos.json", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert find_local_files(str(tmp_path)) == [str(tmp_path / "a.jsonl")]
