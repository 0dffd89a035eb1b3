"""`parscale import`, `export`, `verify` and `inspect` as users run them."""

import json
import pathlib

import pytest
from support.published_checkpoints import change_tensors, save_backbone, save_published

from parscale_adapt import __version__


@pytest.fixture
def published(tmp_path):
    save_backbone(tmp_path / "backbone")
    return save_published(tmp_path / "published", tmp_path / "backbone", num_streams=2)


@pytest.mark.slow
def test_a_published_checkpoint_goes_in_and_comes_out(parscale, tmp_path, published):
    adapter, export, backbone = tmp_path / "adapter", tmp_path / "export", tmp_path / "backbone"
    files = {name: tmp_path / f"{name}.json" for name in ("import", "export", "verify", "inspect")}
    code, out, _ = parscale(
        "import", published, "--output", adapter, "--backbone", backbone, "--json", files["import"]
    )
    assert code == 0
    assert f"backbone: 26 of 26 tensors equal those of {backbone}" in out
    assert f"an adapter of 2 streams, 8 tensors, for the backbone {backbone}" in out
    assert json.loads(files["import"].read_text())["comparison"]["num_identical"] == 26

    code, out, _ = parscale("export", adapter, "--output", export, "--dtype", "bfloat16", "--json", files["export"])
    assert code == 0
    assert "standalone checkpoint of 2 streams" in out
    assert f"parscale verify {export}" in out
    assert json.loads(files["export"].read_text())["dtype"] == "bfloat16"

    code, out, _ = parscale("verify", export, "--json", files["verify"])
    assert code == 0
    assert out.startswith("pass: ")
    assert json.loads(files["verify"].read_text())["passed"] is True

    code, out, _ = parscale("inspect", export, "--json", files["inspect"])
    assert code == 0
    figures = json.loads(files["inspect"].read_text())
    lines = {line[:27].strip(): line[27:].strip() for line in out.splitlines()}
    assert lines["kind"] == figures["kind"] == "standalone checkpoint"
    assert lines["streams (P)"] == "2"
    assert lines["made by"] == f"parscale_adapt {__version__}"
    assert lines["in percent, per stream"] == f"{figures['added_percent_per_stream']:.3f}%"
    assert lines["fingerprint shape"] == figures["fingerprint"]["shape"]


def test_a_difference_from_the_backbone_is_reported(parscale, tmp_path, published):
    name = "model.layers.0.mlp.up_proj.weight"
    change_tensors(published / "model.safetensors", lambda tensors: tensors[name].mul_(2))
    arguments = ("import", published, "--output", tmp_path / "adapter", "--backbone", tmp_path / "backbone")
    code, out, _ = parscale(*arguments)
    assert code == 0
    assert "25 of 26 tensors equal" in out
    assert f"1 are farther apart than the tolerance, first {name}" in out
    assert "with the checkpoint's own backbone" in out


@pytest.mark.slow
def test_a_changed_export_fails_with_exit_code_1(parscale, tmp_path, published):
    parscale("import", published, "--output", tmp_path / "adapter")
    parscale("export", tmp_path / "adapter", "--output", tmp_path / "export", "--format", "published")
    change_tensors(tmp_path / "export" / "model.safetensors", lambda tensors: tensors["model.norm.weight"].mul_(2))
    code, out, err = parscale("verify", tmp_path / "export")
    assert (code, err) == (1, "")
    assert out.startswith("FAIL: ")
    assert "tensors of the streams: 8 of 8 as in the source\n" in out
    assert "logits in float32: largest difference" in out


def test_a_changed_stream_is_named(parscale, tmp_path, published):
    parscale("import", published, "--output", tmp_path / "adapter")
    parscale("export", tmp_path / "adapter", "--output", tmp_path / "export")
    name = "model.layers.1.self_attn.parscale.prefix_k.weight"
    change_tensors(tmp_path / "export" / "model.safetensors", lambda tensors: tensors[name][0].zero_())
    code, out, _ = parscale("verify", tmp_path / "export", "--json", tmp_path / "verify.json")
    assert code == 1
    assert f"7 of 8 as in the source, not {name}" in out
    written = json.loads((tmp_path / "verify.json").read_text())
    assert (written["changed_tensors"], written["passed"]) == ([name], False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("import", "nowhere", "--output", "out"), "There is no folder nowhere: give one"),
        (
            ("import", "backbone", "--output", "out"),
            "must hold a published ParScale checkpoint, got one of the model type 'qwen2'",
        ),
        (("import", "published", "--output", "published"), "exists and is not an empty folder"),
        (("export", "nowhere", "--output", "out"), "There is no folder nowhere: give one"),
        (("export", "nowhere", "--output", "out", "--format", "gguf"), "can't be exported to gguf"),
        (("export", "nowhere", "--output", "out", "--format", "vllm"), "can't be exported to vllm"),
        (("verify", "backbone"), "nothing to compare with"),
        (("inspect", "nowhere"), "There is no folder nowhere: give one"),
        (("inspect", "backbone", "--json", "no/such/file.json"), "does not exist, create it first"),
    ],
)
def test_bad_input_is_one_sentence_and_no_traceback(parscale, tmp_path, published, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    code, out, err = parscale(*arguments)
    assert (code, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_documented_commands_exist(parscale):
    text = (pathlib.Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    commands = [line.split("#")[0].split() for line in text.splitlines() if line.startswith("parscale ")]
    assert {command[1] for command in commands} == {"import", "export", "verify", "inspect"}
    for command in commands:
        code, out, _ = parscale(command[1], "--help")
        assert code == 0
        assert all(word in out for word in command if word.startswith("--"))
