"""Raw text from local files: what is read, and one clear sentence for what cannot be."""

import json
import socket

import datasets
import huggingface_hub
import pytest

from parscale_adapt.data import TextSource, load_source
from parscale_adapt.data.sources import find_local_files


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


def test_missing_things_are_named_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("missing.jsonl", "./missing", "/missing/folder", "data/missing.csv"):
        with pytest.raises(ValueError, match=r"missing.* does not exist; looked from"):
            load_source(TextSource(path))
    with pytest.raises(ValueError, match=r"no file matches \*\.txt"):
        load_source(TextSource("*.txt"))
    with pytest.raises(ValueError, match="neither an existing file or folder nor a hub dataset name"):
        load_source(TextSource("a b/c"))
    (tmp_path / "empty_folder").mkdir()
    with pytest.raises(ValueError, match=r"the folder empty_folder holds no .jsonl, .json, .parquet or .txt file"):
        load_source(TextSource("empty_folder"))


def test_unknown_and_mixed_kinds_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text\nhello\n")
    with pytest.raises(ValueError, match=r"a\.csv: unknown extension '\.csv'; use \.jsonl, .*or \.txt"):
        load_source(TextSource(str(tmp_path / "a.csv")))
    (tmp_path / "a.txt").write_text("hello")
    write_jsonl(tmp_path / "b.jsonl", [{"text": "b"}])
    with pytest.raises(ValueError, match=r"several kinds \(json, text\)"):
        load_source(TextSource(str(tmp_path)))


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_content_is_refused_on_opening(tmp_path, streaming):
    def load(path, **options):
        return load_source(TextSource(str(path), streaming=streaming, **options))

    path = write_jsonl(tmp_path / "a.jsonl", [{"body": "hello", "id": 1}])
    with pytest.raises(ValueError, match="has no field 'text'; its fields are body, id; set text_field"):
        load(path)
    with pytest.raises(TypeError, match=r"the field 'id' .*holds .*int.*, not text"):
        load(path, text_field="id")
    with pytest.raises(ValueError, match=r"\(split 'nope'\) cannot be read"):
        load(path, split="nope")
    with pytest.raises(ValueError, match="name='x' is a hub configuration and local files have none"):
        load(path, name="x")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty\.jsonl is empty"):
        load(tmp_path / "empty.jsonl")
    datasets.Dataset.from_dict({"text": []}).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(ValueError, match=r"the split 'train' is empty|corresponds to no data"):
        load(tmp_path / "none.parquet")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"\n{{{')
    with pytest.raises(ValueError, match=r"broken\.jsonl \(split 'train'\) cannot be read: \w+"):
        load(tmp_path / "broken.jsonl")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"latin\.txt .* cannot be read: .*utf-8"):
        load(tmp_path / "latin.txt")


def test_documents_without_text_are_counted(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": None}, {"text": "b"}])
    with pytest.raises(TypeError, match=r"1 of 3 documents have no text \(null\)"):
        load_source(TextSource(path))


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), "1", True])
def test_bad_weights_are_refused(weight):
    with pytest.raises(ValueError, match="a source weight must be a finite number above 0"):
        TextSource("owner/name", weight=weight)


def test_empty_path_is_refused():
    with pytest.raises(ValueError, match="a text source needs a path"):
        TextSource("")
