"""The benchmarks run for real, at a tiny size, and write what they promise. Nothing is said about times."""

import contextlib
import io
import itertools
import json
import os
import re
import runpy
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, Qwen2Config

from parscale_adapt import cli
from parscale_adapt.analysis.measured import read_measured


REPOSITORY = Path(__file__).parents[2]
TINY = ("--hidden_size", "128", "--num_layers", "1", "--vocab_size", "64")


def run(script, *arguments, shape=TINY):
    """The script as `python benchmarks/SCRIPT` runs it, in this process; what it prints."""
    path = REPOSITORY / "benchmarks" / script
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
        patch.setattr(sys, "argv", [str(path), *shape, *arguments])
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
    output = run("train_step.py", "--streams", "2", "4", "--seq_len", "8", "--train_repeats", "3")
    assert f"torch {torch.__version__}" in output
    rows = table_rows(output)
    assert [row[:2] for row in rows] == [[training, str(count)] for training in ("frozen", "full") for count in (2, 4)]
    for row in rows:
        plain, streams = ([float(number) for number in re.findall(r"\d+\.\d+", cell)] for cell in row[2:4])
        assert all(0 < lowest <= median <= highest for median, lowest, highest in (plain, streams))
        assert 0 < float(row[4]) == pytest.approx(streams[0] / plain[0], rel=0.5)  # of rounded medians
    # Per token and stream of one layer of hidden size 128: its matrices, four times the keys seen (half of 8 and half an own
    # one) times 128, and a share of the LM head; with a prefix of 48 keys and the aggregator's 128 + 1 outputs on top.
    matrices = 2 * (2 * 128 * 128 + 2 * 128 * 128 + 3 * 128 * 320)
    for count, row in zip((2, 4), rows[:2]):
        plain = matrices + 4 * 4.5 * 128 + 2 * 64 * 128 / count
        assert float(row[5]) == pytest.approx(1 + (4 * 48 * 128 + 2 * 128 * 129) / plain, abs=1e-3)


@pytest.mark.parametrize("is_full", [False, True])
def test_steps_that_are_compared_have_as_many_rows_in_the_decoder_and_at_the_head(monkeypatch, is_full):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    from train_cases import CHUNKS, PLAIN, STREAMS, TrainCase, TrainModel

    shape = {"hidden_size": 128, "num_layers": 1, "vocab_size": 64, "batch_size": 2, "seq_len": 8}
    model = TrainModel(Namespace(**shape, device="cpu", dtype="float32"), 3, is_full)
    base, rows = model.model.get_base_model(), {"decoder": [], "head": []}
    for name, module in (("decoder", base.model.layers[0]), ("head", base.lm_head)):
        module.register_forward_hook(lambda module, args, output, name=name: rows[name].append(args[0].shape[:2]))
    seen = {}
    for kind in (PLAIN, STREAMS, CHUNKS):
        case = TrainCase(kind, is_full, 3, is_checkpointed=False)
        model.prepare(case)
        model.step(case)
        seen[kind], rows["decoder"], rows["head"] = dict(rows), [], []
    assert seen[PLAIN] == seen[STREAMS] == {"decoder": [(3 * 2, 8)], "head": [(2, 8)]}
    assert seen[CHUNKS]["head"] == [(2, 8)]
    assert set(seen[CHUNKS]["decoder"]) == {(2, 8)}


def test_steps_that_are_compared_take_turns_behind_their_warm_up(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    import train_cases
    from train_cases import CHUNKS, PLAIN, STREAMS

    ran, shape = [], {"hidden_size": 128, "num_layers": 1, "vocab_size": 64, "batch_size": 1, "seq_len": 8}
    monkeypatch.setattr(train_cases.TrainModel, "step", lambda model, case: ran.append(case.kind))
    cases = [train_cases.TrainCase(kind, False, 2, is_checkpointed=False) for kind in (PLAIN, STREAMS, CHUNKS)]
    train_cases.measure_times(cases, Namespace(**shape, device="cpu", dtype="float32", train_repeats=2))
    forward = [PLAIN, STREAMS, CHUNKS]
    assert ran == [CHUNKS, *forward, *reversed(forward), *forward]
    assert [len(case.times) for case in cases] == [2, 2, 2]


def test_the_memory_benchmark_prints_peaks_and_times_of_streams_and_of_the_plain_backbone():
    shape = ("--hidden_size", "128", "--num_layers", "2", "--vocab_size", "1536")
    sizes = ("--num_streams", "4", "--batch_size", "2", "--seq_len", "256")
    rows = table_rows(run("train_memory.py", *sizes, "--repeats", "1", shape=shape))
    kinds = ["plain backbone, B rows", "plain backbone, P * B rows", "in chunks", "all at once"]
    assert [row[:2] for row in rows] == [[training, kind] for training in ("frozen", "full") for kind in kinds]
    for plain, plain_rows, chunks, together in (rows[:4], rows[4:]):
        assert float(plain[2]) < float(chunks[2]) < float(together[2]) < float(plain_rows[2])
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


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Figures, screen and page of benchmarks/bench.py, in a process of its own, since it forks."""
    folder = tmp_path_factory.mktemp("bench")
    page = folder / "page.md"
    page.write_text("before\n<!-- bench: begin -->\nold\n<!-- bench: end -->\nafter\n")
    sizes = "--train_streams 2 4 --seq_len 16 --train_repeats 1 --decode_streams 1 2 --batch_sizes 1 2 --contexts 8 32"
    output = bench(
        *TINY, *sizes.split(), "--output_len", "3", "--no-compile", "--json", folder / "b.json", "--page", page
    )
    return json.loads((folder / "b.json").read_text()), output, page


def bench(*arguments):
    command = [sys.executable, REPOSITORY / "benchmarks" / "bench.py", *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "250", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_one_run_measures_every_kind_of_step_with_its_peak_and_the_limit(whole_run):
    rows = whole_run[0]["training"]
    kinds = ("plain backbone", "streams", "streams in chunks")
    expected = {("frozen", 1, "LoRA", checkpointed) for checkpointed in (False, True)} | {
        (training, streams, kind, checkpointed)
        for training in ("frozen", "full")
        for streams in (2, 4)
        for kind in kinds
        for checkpointed in (False, True)
    }
    assert {(row["training"], row["num_streams"], row["kind"], row["checkpointed"]) for row in rows} == expected
    assert all(row["fraction_of_limit"] > 0 and row["seconds"] > 0 and row["peak_mib"] >= 0 for row in rows)
    assert all(row["time_ratio"] == 1 for row in rows if row["kind"] == "plain backbone")
    needed = {
        (row["kind"], row["training"], row["num_streams"]): row["fraction_of_limit"] * row["seconds"] for row in rows
    }
    for training, streams in itertools.product(("frozen", "full"), (2, 4)):  # which have no prefix and no aggregator
        plain, ours, chunks = (needed[kind, training, streams] for kind in kinds)
        assert plain < ours == pytest.approx(chunks)


@pytest.mark.slow
def test_one_run_says_where_the_time_of_each_kind_of_step_goes(whole_run):
    rows = whole_run[0]["profile"]
    kinds = ("plain backbone", "streams", "streams in chunks")
    assert [(row["training"], row["kind"]) for row in rows] == list(itertools.product(("frozen", "full"), kinds))
    assert all(row["num_streams"] == 4 for row in rows)
    for row in rows:
        assert list(row["milliseconds"]) == ["attention", "matrix products", "copies and layout", "everything else"]
        assert all(time > 0 for time in row["milliseconds"].values())
    operations = {(row["training"], row["kind"]): row["operations"] for row in rows}
    assert operations["full", "streams in chunks"] > 2 * operations["full", "streams"] > 0  # four chunks of one


def test_operations_are_grouped_by_their_names(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    from step_profile import group_of

    groups = {
        "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "pytorch_flash::flash_fwd_kernel"),
        "matrix products": ("aten::mm", "aten::addmm", "ampere_sgemm_128x64_tn"),
        "copies and layout": ("aten::copy_", "aten::cat", "aten::constant_pad_nd"),
        "everything else": (
            "aten::mul",
            "aten::mean",
            "aten::matmul",
            "autograd::engine::evaluate_function: MmBackward0",
        ),
    }
    assert {name: group_of(name) for names in groups.values() for name in names} == {
        name: group for group, names in groups.items() for name in names
    }


@pytest.mark.slow
def test_one_run_measures_every_cache_batch_and_context(whole_run):
    rows = whole_run[0]["decoding"]
    cases = [(row["batch_size"], row["context"], row["cache"], row["num_streams"]) for row in rows]
    assert cases == list(itertools.product((1, 2), (8, 32), ("dynamic", "static"), (1, 2)))
    assert all(row["ratio"] == 1 for row in rows if row["num_streams"] == 1)
    assert all(row["ms_per_token"] > 0 and row["prefill_seconds"] > 0 for row in rows)


@pytest.mark.slow
def test_the_page_holds_the_run_between_its_marks_and_can_be_written_again(whole_run, tmp_path):
    figures, output, page = whole_run
    text = page.read_text()
    assert text.startswith("before\n<!-- bench: begin -->\n")
    assert text.endswith("<!-- bench: end -->\nafter\n")
    assert "old" not in text
    assert f"torch {torch.__version__}" in text
    assert figures["command"] in text
    assert (
        text.count("\n| ") == len(figures["training"]) + len(figures["profile"]) + len(figures["decoding"]) + 6
    )  # heads and rules
    for name in ("bench_training.png", "bench_decoding.png"):
        assert f"images/{name}" in text
        assert (page.parent / "images" / name).read_bytes().startswith(b"\x89PNG")
    again = tmp_path / "page.md"
    again.write_text("<!-- bench: begin --><!-- bench: end -->")
    assert bench("--from_json", page.parent / "b.json", "--page", again) == output
    assert again.read_text().strip() in text


def test_a_page_without_marks_is_refused(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    from bench_page import write_page

    page = tmp_path / "page.md"
    page.write_text("<!-- bench: begin -->")
    with pytest.raises(
        ValueError, match="must have the lines <!-- bench: begin --> and <!-- bench: end --> once each"
    ):
        write_page({}, page)


@torch.no_grad()
@pytest.mark.parametrize("num_streams", [1, 3])
def test_the_arithmetic_of_the_limit_is_what_torch_counts(monkeypatch, num_streams):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    import decode_cases
    from limits import ForwardPass, Limits, forward_work, seconds_at_limit

    args = Namespace(hidden_size=128, num_layers=2, vocab_size=64, device="cpu", dtype="float32")
    model = decode_cases._model(args, num_streams)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(2, 1, dtype=torch.long), use_cache=False)
    work = forward_work(model.config, 4, ForwardPass(num_streams, batch_size=2, num_tokens=1))
    # torch counts no attention of one token to itself alone, which it does by a kernel that it doesn't know.
    attention = 0 if num_streams > 1 else work[1].flops
    assert sum(part.flops for part in work) - attention == counter.get_total_flops()
    decoder = model.get_base_model().model if num_streams > 1 else model.model
    matrices = sum(p.nbytes for name, p in decoder.layers.named_parameters() if p.dim() == 2)
    assert work[0].num_bytes == matrices
    assert seconds_at_limit(work, Limits(1, 1e30)) == sum(part.flops for part in work)
    assert seconds_at_limit(work, Limits(1e30, 1)) == sum(part.num_bytes for part in work)


def test_caches_that_are_too_large_are_left_out(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    from decode_cases import cache_bytes, decode_cases

    config = Qwen2Config(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    cache = DynamicCache(config=config)
    for layer in range(2):
        cache.update(torch.zeros(3, 4 * 2, 10, 64), torch.zeros(3, 4 * 2, 10, 64), layer)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes(config, 4, num_streams=4, batch_size=3, context=10) == held
    settings = {"batch_sizes": [3], "contexts": [5, 10], "decode_streams": [2, 4], "compile": False}
    cases = decode_cases(Namespace(**settings, max_cache_gib=held / 2**30), config, 4)
    assert len(cases) == 8
    cases = decode_cases(Namespace(**settings, max_cache_gib=(held - 1) / 2**30), config, 4)
    assert {(case.num_streams, case.context) for case in cases} == {(2, 5), (2, 10), (4, 5)}


def test_the_attention_benchmark_compares_three_ways_that_agree():
    sizes = ("--seq_len", "32", "--num_streams", "2", "--batch_size", "2")
    rows = table_rows(run("prefix_attention.py", "--repeats", "1", shape=sizes))
    assert [row[0] for row in rows] == ["keys alone", "prefix in front of the keys", "two calls, joined"]
    assert all(float(row[1]) > 0 for row in rows)
