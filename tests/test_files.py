"""Files and folders that appear whole or not at all."""

import os
import subprocess
import sys

import pytest

from parscale_adapt.files import new_folder, write_atomically, write_text


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "law.json"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_replaced_and_not_rewritten(tmp_path):
    path = tmp_path / "law.json"
    path.write_text("old")
    with path.open() as reader:
        write_text(path, "n\u00e9w")
        assert reader.read() == "old"
    assert path.read_bytes() == b"n\xc3\xa9w"
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def fill_and_fail(target):
    with new_folder(target) as staging:
        (staging / "weights").write_text("half")
        raise RuntimeError("disk full")


@pytest.mark.parametrize("target", ["out", "some/where/out"])
def test_a_new_folder_is_there_whole_or_not_at_all(tmp_path, target):
    with pytest.raises(RuntimeError, match="disk full"):
        fill_and_fail(tmp_path / target)
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / target) as staging:
        (staging / "weights").write_text("whole")
        assert not (tmp_path / target).exists()
    assert [path.name for path in (tmp_path / target).parent.iterdir()] == ["out"]
    assert (tmp_path / target / "weights").read_text() == "whole"


def test_a_folder_with_contents_is_no_new_one(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("kept")
    with (
        pytest.raises(ValueError, match="exists and is not an empty folder: choose another"),
        new_folder(tmp_path / "out"),
    ):
        pass
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_it_needs_the_standard_library_alone():
    from parscale_adapt import files

    code = f"import runpy, sys; runpy.run_path({files.__file__!r}); print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert {name.partition(".")[0] for name in loaded.split()} <= {*sys.stdlib_module_names, "__main__"}
