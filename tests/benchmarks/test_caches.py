"""benchmarks/caches.py runs for real, at a tiny size, and measures what it says."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.tiny_models import tiny_model
from support.tiny_tokenizers import byte_tokenizer


REPOSITORY = Path(__file__).parents[2]
TEXT = "the streams of a sample meet in the aggregator and nowhere else " * 3
SIZES = ("--num_streams", "1", "--prompt_len", "24", "--num_scored", "16", "--piece_len", "5")


@torch.no_grad()
def test_bytes_of_caches_and_the_loss_behind_them(tmp_path):
    model, tokenizer = tiny_model(vocab_size=261), byte_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    files = ("--model", tmp_path, "--text", tmp_path / "text.txt", "--json", tmp_path / "caches.json")
    command = [sys.executable, REPOSITORY / "benchmarks" / "caches.py", *map(str, files), *SIZES]
    output = subprocess.run(command, env={**os.environ, "COLUMNS": "200"}, capture_output=True, text=True, check=True)
    rows = {row["cache"]: row for row in json.loads((tmp_path / "caches.json").read_text())["rows"]}
    dynamic, fp8 = rows["dynamic"], rows["fp8"]
    assert dynamic["bytes"] == 2 * 2 * 2 * (24 + 15) * 8 * 4  # layers, keys and values, heads, tokens, size, float32
    assert dynamic["bytes"] / 4 <= fp8["bytes"] < 0.4 * dynamic["bytes"]
    ids = tokenizer(TEXT, return_tensors="pt").input_ids[:, :40]
    losses = torch.nn.functional.cross_entropy(model(ids).logits[0, 23:-1], ids[0, 24:])
    assert dynamic["loss"] == pytest.approx(losses.item(), abs=1e-4)
    assert fp8["loss"] != dynamic["loss"]
    for name, package in (("hqq, 4 bit", "hqq"), ("quanto, 4 bit", "optimum.quanto")):
        if importlib.util.find_spec(package.partition(".")[0]) is None:
            assert package.partition(".")[0] in rows[name]["missing"].lower()
            assert name in output.stdout
