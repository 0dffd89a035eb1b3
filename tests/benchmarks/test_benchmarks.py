"""The benchmarks run for real, at a tiny size, and write what they promise. Nothing is said about times."""

import contextlib
import io
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from parscale_adapt import cli
from parscale_adapt.analysis.measured import read_measured


REPOSITORY = Path(__file__).parents[2]
TINY = ("--hidden_size", "128", "--num_layers", "1", "--vocab_size", "64")


def run(script, *arguments):
    """The script as `python benchmarks/SCRIPT` runs it, in this process; what it prints."""
    path = REPOSITORY / "benchmarks" / script
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
        patch.setattr(sys, "argv", [str(path), *TINY, *arguments])
        patch.setenv("COLUMNS", "200")
        patch.syspath_prepend(str(path.parent))
        runpy.run_path(str(path), run_name="__main__")
    return output.getvalue()


def table_rows(output):
    lines = [line.split("│")[1:-1] for line in output.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line] for line in lines]


@pytest.fixture(scope="module")
def decoding(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decode")
    arguments = ("--streams", "2", "4", "--contexts", "6", "12", "--output_len", "4", "--save_config", str(folder))
    return folder, run("decode.py", *arguments, "--json", str(folder / "decode.json"))


def test_the_training_benchmark_prints_a_ratio_for_frozen_and_full_training():
    output = run("train_step.py", "--streams", "2", "--seq_len", "8", "--repeats", "1")
    assert f"torch {torch.__version__}" in output
    rows = table_rows(output)
    assert [row[:2] for row in rows] == [["frozen", "2"], ["full", "2"]]
    assert all(float(cell) > 0 for row in rows for cell in row[2:])


def test_the_memory_benchmark_prints_peaks_and_times_of_chunks_and_of_the_plain_backbone():
    sizes = ("--num_streams", "4", "--batch_size", "1", "--seq_len", "64")
    rows = table_rows(run("train_memory.py", *sizes, "--repeats", "1"))
    kinds = ["plain backbone", "in chunks", "all at once"]
    assert [row[:2] for row in rows] == [[training, kind] for training in ("frozen", "full") for kind in kinds]
    for plain, chunks, together in (rows[:3], rows[3:]):
        assert float(plain[2]) < float(chunks[2]) < float(together[2])
        assert (plain[3], together[5]) == ("1.00", "1.00")


def test_the_decoding_benchmark_measures_every_cache_context_and_number_of_streams(decoding):
    folder, output = decoding
    assert f"torch {torch.__version__}" in output
    expected = [
        [str(context), cache, streams]
        for context in (6, 12)
        for cache in ("dynamic", "static")
        for streams in ("backbone", "2", "4")
    ]
    rows = table_rows(output)
    assert [row[:3] for row in rows] == expected
    assert all(re.fullmatch(r"\d+\.\d\d", cell) for row in rows for cell in row[3:])
    assert [row[4] for row in rows if row[2] == "backbone"] == ["1.00"] * 4
    steps = json.loads((folder / "decode.json").read_text())["steps"]
    assert [f"{step['ms_per_token']:.2f}" for step in steps] == [row[3] for row in rows]


def test_its_file_holds_measurements_that_grow_with_streams_and_context(decoding):
    rows = read_measured(decoding[0] / "decode.json")
    memory = {(row.num_streams, row.input_len): row.memory_gib for row in rows}
    assert set(memory) == {(streams, context) for streams in (1, 2, 4) for context in (6, 12)}
    assert all((row.batch_size, row.output_len) == (1, 4) for row in rows)
    assert all(memory[first, context] < memory[2 * first, context] for first in (1, 2) for context in (6, 12))
    assert all(memory[streams, 6] < memory[streams, 12] for streams in (1, 2, 4))


def test_cost_lays_the_measurements_over_its_estimate(decoding, monkeypatch, tmp_path):
    folder, picture = decoding[0], tmp_path / "cost.png"
    drawn = []
    from parscale_adapt.analysis import plots

    draw = plots._draw_measured
    monkeypatch.setattr(
        plots, "_draw_measured", lambda axes, rows, *rest: (drawn.append(rows), draw(axes, rows, *rest))
    )
    arguments = ["cost", "--model", str(folder), "--dtype", "float32", "--num-streams", "4", "--input-len", "6"]
    arguments += ["--measured", str(folder / "decode.json"), "--plot", str(picture)]
    monkeypatch.setattr(sys, "argv", ["parscale", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code in (0, None)
    assert picture.read_bytes().startswith(b"\x89PNG")
    measured = read_measured(folder / "decode.json")
    for rows in drawn:
        assert [row.num_streams for row in rows] == [1, 2, 4]
        latencies = [[row.latency_seconds for row in measured if row.num_streams == count] for count in (1, 2, 4)]
        assert [row.latency_seconds for row in rows] == pytest.approx([sum(pair) / 2 for pair in latencies])
    assert len(drawn) == 2


def test_live_tensors_count_what_lives_at_the_same_time(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    from decode import LiveTensors

    model = torch.nn.Linear(256, 256, bias=False)
    kilobyte = 1024
    with LiveTensors(model) as tensors:
        for _ in range(3):
            first = torch.zeros(64 * kilobyte, dtype=torch.uint8)
            second = first.view(2, -1)[0] + 1
            del first, second
        kept = torch.zeros(16 * kilobyte, dtype=torch.uint8)
    assert tensors.peak == (256 + 64 + 32) * kilobyte
    assert tensors.live == (256 + 16) * kilobyte
    del kept
    assert tensors.live == 256 * kilobyte


@pytest.mark.slow
def test_the_serving_benchmark_asks_a_server_of_every_number_of_streams(tmp_path):
    pytest.importorskip("openai", reason="the server needs `pip install '.[serving]'`")
    sizes = ("--vocab_size", "320", "--requests", "1", "--new_tokens", "4", "--clients", "1", "2")
    file = tmp_path / "serving.json"
    output = run("serving.py", *sizes, "--engines", "transformers", "--streams", "1", "2", "--json", str(file))
    expected = [["transformers", streams, clients] for streams in ("1", "2") for clients in ("1", "2")]
    assert [row[:3] for row in table_rows(output)] == expected
    assert all(float(row["tokens_per_second"]) > 0 for row in json.loads(file.read_text())["rows"])


def test_the_serving_benchmark_says_where_vllm_comes_from(tmp_path):
    with pytest.raises(SystemExit, match="run `make test-vllm`, or name another with --vllm_python"):
        run("serving.py", "--vllm_python", str(tmp_path / "nowhere"))
