"""Names and paths of what is scored."""

import pytest

from parscale_adapt.evaluation.settings import named_entries


@pytest.mark.parametrize(
    ("value", "name", "path"),
    [
        ("p4=runs/lr=0.1", "p4", "runs/lr=0.1"),
        ("runs/qwen2.5-3b_p4", "qwen2.5-3b_p4", "runs/qwen2.5-3b_p4"),
        ("user/Qwen2.5-p4", "Qwen2.5-p4", "user/Qwen2.5-p4"),
        ({"path": "a/b.c"}, "b.c", "a/b.c"),
        ({"name": "mine", "path": "a/b=c"}, "mine", "a/b=c"),
    ],
)
def test_an_adapter_is_called_as_its_folder(value, name, path):
    assert named_entries([value], "adapters", ()) == [{"name": name, "path": path}]


def test_a_path_that_exists_is_no_name(tmp_path):
    folder, file = tmp_path / "lr=0.1", tmp_path / "my text=1.jsonl"
    folder.mkdir()
    file.touch()
    assert named_entries([str(folder)], "adapters", ()) == [{"name": "lr=0.1", "path": str(folder)}]
    assert named_entries([str(folder), str(file)], "texts", ()) == [
        {"name": "lr=0.1", "path": str(folder)},
        {"name": "my text=1", "path": str(file)},
    ]
