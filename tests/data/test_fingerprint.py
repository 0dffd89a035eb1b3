"""Data by its content: what changes is seen, however large the file."""

import os

import datasets
import pytest
from datasets import Dataset

from parscale_adapt.data import DataSource, content_of, fingerprint, fingerprint_of_files


def test_names_order_and_every_byte_count(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("a b")
    two.write_text("c d")
    found = {fingerprint_of_files([one, two]), fingerprint_of_files([two, one]), fingerprint_of_files([one])}
    two.write_text("c e")
    found.add(fingerprint_of_files([one, two]))
    two.rename(tmp_path / "three")
    found.add(fingerprint_of_files([one, tmp_path / "three"]))
    assert len(found) == 5


def test_the_same_content_written_again_is_the_same(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{}")
    before = fingerprint_of_files([path])
    path.write_text("{}")
    os.utime(path, (1, 1))
    assert fingerprint_of_files([path]) == before


def test_of_a_large_file_its_size_and_blocks_from_first_to_last_byte_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "WHOLE_BELOW", 1000)
    monkeypatch.setattr(fingerprint, "BLOCK_SIZE", 4)
    path = tmp_path / "large"
    content = bytearray(10_000)
    path.write_bytes(content)
    before = fingerprint_of_files([path])
    for position in (0, 3, 9_999, 9_996, (10_000 - 4) * 31 // 63):
        changed = bytearray(content)
        changed[position] = 1
        path.write_bytes(changed)
        assert fingerprint_of_files([path]) != before, position
    path.write_bytes(content + b"\0")
    assert fingerprint_of_files([path]) != before
    unseen = bytearray(content)
    unseen[10] = 1  # between the first block and the second, as the docstring says
    path.write_bytes(unseen)
    assert fingerprint_of_files([path]) == before


def test_a_folder_of_save_to_disk_is_read_to_the_bottom(tmp_path):
    Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved")
    before = content_of(DataSource(str(tmp_path / "saved")))
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:-1] + b"x")
    assert content_of(DataSource(str(tmp_path / "saved"))) != before


def test_of_a_split_only_its_files_count(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "test.jsonl").write_text('{"text": "b"}\n')
    train, test = (DataSource(str(tmp_path), split=split) for split in ("train", "test"))
    before = content_of(train), content_of(test)
    (tmp_path / "test.jsonl").write_text('{"text": "c"}\n')
    assert content_of(train) == before[0]
    assert content_of(test) != before[1]


@pytest.mark.parametrize("is_offline", [False, True])
def test_a_hub_dataset_is_known_by_its_commit(tmp_path, monkeypatch, is_offline):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)

    class Hub:
        def dataset_info(self, name, timeout):
            if is_offline:
                raise ConnectionError("no network")
            return type("Info", (), {"sha": "a" * 40})

    monkeypatch.setattr(fingerprint, "HfApi", Hub)
    source = DataSource("owner/name")
    assert content_of(source) == (None if is_offline else "a" * 40)
    for number, commit in enumerate("bc"):
        folder = tmp_path / "owner___name" / "default" / "0.0.0" / (commit * 40)
        folder.mkdir(parents=True)
        os.utime(folder, (number, number))
    assert content_of(source) == ("c" * 40 if is_offline else "a" * 40)
