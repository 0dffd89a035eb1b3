"""`parscale diagnose` on an adapter folder and a text file: tables, JSON, picture, and one sentence for bad input."""

import json
from itertools import chain

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.tiny_models import tiny_model, with_streams

from parscale_adapt.analysis.diagnostics import diagnose
from parscale_adapt.data import PackedCollator, TextSource, load_source, pack_dataset, train_tokenizer


TEXTS = [f"def f{index}(x):\n    return x + {index}\n" for index in range(12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A backbone with its tokenizer, adapters on it, and text."""
    root = tmp_path_factory.mktemp("diagnose")
    tokenizer = train_tokenizer(TEXTS, 262)
    tokenizer.save_pretrained(root / "backbone")
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(root / "backbone")

    def backbone():
        return type(tiny_model()).from_pretrained(root / "backbone")

    for num_streams in (1, 3):
        with_streams(backbone(), num_streams).save_pretrained(root / f"p{num_streams}")
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    get_peft_model(backbone(), lora).save_pretrained(root / "lora")
    (root / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (root / "code.jsonl").write_text("".join(json.dumps({"code": text}) + "\n" for text in TEXTS))
    (root / "blank.jsonl").write_text('{"text": ""}\n{"text": ""}\n')
    (root / "empty.jsonl").write_text("")
    return root


def test_tables_json_and_picture_hold_the_figures_of_diagnose(parscale, folder, tmp_path):
    outputs = ("--json", tmp_path / "streams.json", "--plot", tmp_path / "streams.png")
    size = ("--max-rows", 5, "--max-length", 32, "--batch-size", 2)
    code, out, _ = parscale("diagnose", folder / "p3", "--data", folder / "text.jsonl", *size, *outputs)
    assert code == 0
    assert (tmp_path / "streams.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "streams.json").read_text())

    from peft import PeftModel
    from transformers import AutoTokenizer

    model = PeftModel.from_pretrained(type(tiny_model()).from_pretrained(folder / "backbone"), folder / "p3").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "backbone")
    rows = pack_dataset(load_source(TextSource(str(folder / "text.jsonl"))), tokenizer, 32).select(range(5))
    batch = PackedCollator(0)(list(rows))
    expected = diagnose(model, [batch])
    assert found["num_tokens"] == expected.num_tokens
    for name in ("mean_weight", "own_loss", "mixture_loss", "plain_mean_loss", "rho", "entropy", "largest_share"):
        assert found[name] == pytest.approx(getattr(expected, name), rel=1e-5)
    with torch.no_grad():
        assert found["mixture_loss"] == pytest.approx(model(**batch).loss.item(), rel=1e-5)
    for name in ("mixture_loss", "plain_mean_loss", "averaged_prediction_loss", "rho", "entropy"):
        assert f"{found[name]:.4f}" in out
    for value in (*found["mean_weight"], *found["own_loss"], *chain.from_iterable(found["pairwise_rho"])):
        assert f"{value:.4f}" in out
    for layer in found["layers"]:
        assert layer["layer"] in out
        assert f"{layer['mean_cosine']:.4f}" in out
    assert all(f"{step['loss']:.4f}" in out for step in found["removal"])
    assert found["removal"][0]["removed"] is None


def test_column_backbone_and_irreducible_loss_can_be_given(parscale, folder, tmp_path):
    common = ("diagnose", folder / "p3", "--max-length", 32, "--json", tmp_path / "streams.json")
    assert parscale(*common, "--data", folder / "text.jsonl")[0] == 0
    first = json.loads((tmp_path / "streams.json").read_text())
    moved = folder.with_name("moved")
    (folder / "backbone").rename(moved)
    try:
        code, _, err = parscale(*common, "--data", folder / "text.jsonl")
        assert code == 1
        assert "can't be opened, give it with --backbone" in err
        options = ("--data", folder / "code.jsonl", "--text-field", "code", "--irreducible-loss", 2)
        code, out, err = parscale(*common, *options, "--backbone", moved)
    finally:
        moved.rename(folder / "backbone")
    assert code == 0, err
    second = json.loads((tmp_path / "streams.json").read_text())
    assert second["own_loss"] == first["own_loss"]
    assert second["rho"] < first["rho"]
    assert "upper bound" not in out


@pytest.mark.parametrize(
    ("adapter", "data", "options", "message"),
    [
        ("lora", "text.jsonl", (), "lora must hold a ParScale adapter, got one of the method LORA"),
        ("p1", "text.jsonl", (), "p1 must be at least 2, got 1: it has one stream, nothing to compare"),
        ("backbone", "text.jsonl", (), "must hold a ParScale adapter, got a plain checkpoint"),
        ("nothing", "text.jsonl", (), "There is no folder"),
        ("p3", "missing.jsonl", (), "missing.jsonl does not exist"),
        ("p3", "missing", (), "missing does not exist"),
        ("p3", "empty.jsonl", (), "empty.jsonl has no rows"),
        ("p3", "blank.jsonl", (), "blank.jsonl, whose documents are all empty"),
        ("p3", "code.jsonl", (), "has no field 'text'"),
        ("p3", "text.jsonl", ("--irreducible-loss", 50), "must lie below every loss of the streams, got 50"),
        ("p3", "text.jsonl", ("--plot", "streams.pdf"), "pictures are written as PNG"),
        (
            "p3",
            "text.jsonl",
            ("--backbone", "no/such/model"),
            "can't be opened, give it with --backbone: There is no folder no/such/model",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_no_file(parscale, folder, tmp_path, adapter, data, options, message):
    arguments = ("diagnose", folder / adapter, "--data", folder / data, "--json", tmp_path / "streams.json", *options)
    code, _, err = parscale(*arguments)
    assert code == 1
    assert message in err
    sentences = [line for line in err.splitlines() if line.startswith("parscale: ")]
    assert len(sentences) == 1
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_name_of_a_dataset_on_the_hub_is_not_looked_up(parscale, folder):
    code, _, err = parscale("diagnose", folder / "p3", "--data", "owner/name")
    assert code == 1
    assert "`--data` must be a file or folder, got owner/name" in err


def test_data_is_required(parscale, folder):
    code, _, err = parscale("diagnose", folder / "p3")
    assert code == 2
    assert "--data" in err
