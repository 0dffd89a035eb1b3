"""The cost estimate against the authors' own numbers, the comparison at equal loss, and the paper's claim."""

import os


# On a busy machine the fit's tiny linear systems wait for BLAS threads; this must precede the import of scipy.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import csv
from dataclasses import replace

import pytest

from parscale_adapt.analysis.backbone_shape import load_shape, published_shape
from parscale_adapt.analysis.comparison import compare, mean_cost, square_workloads
from parscale_adapt.analysis.cost import PRECISIONS, CostModel, Workload
from parscale_adapt.analysis.devices import DEVICES, find_device
from parscale_adapt.analysis.measured import MeasuredCost, mean_over_lengths, read_measured
from parscale_adapt.analysis.paper_claims import PUBLISHED_RATIOS, measured_losses, readings_of_the_paper
from parscale_adapt.analysis.parameter_count import Qwen2Shape
from parscale_adapt.analysis.scaling_law import LogLaw


A100 = find_device("a100-80gb")
LAW = LogLaw(A=1.13e7, alpha=0.19, E=0.69, k=0.39)


def model(size="1.6B", **options):
    return CostModel(load_shape(size), options.pop("device", A100), **options)


def printed(cost):
    return f"{cost.memory_gib:.3f}", f"{cost.latency_seconds:.3f}"


def test_every_number_of_the_authors_script_is_reproduced_to_the_digit(golden):
    rows = list(csv.DictReader((golden / "cost.csv").open()))
    assert len(rows) == 384
    for row in rows:
        shape = published_shape("size", Qwen2Shape(int(row["hidden_size"]), int(row["intermediate_size"])))
        workload = Workload(int(row["batch_size"]), int(row["length"]), int(row["length"]))
        cost = CostModel(shape, A100).estimate(workload, int(row["num_streams"]))
        assert printed(cost) == (row["memory_gib"], row["latency_s"]), row


@pytest.mark.parametrize(
    ("size", "num_streams", "batch_size", "length", "expected"),
    [
        # Rows of the same golden file, for machines that lack it.
        ("0.5B", 1, 1, 64, ("1.272", "0.048")),
        ("0.7B", 2, 2, 128, ("1.706", "0.128")),
        ("1.6B", 8, 1, 256, ("3.598", "0.578")),
        ("4.4B", 4, 8, 512, ("11.622", "4.324")),
    ],
)
def test_sampled_numbers_of_the_authors_script(size, num_streams, batch_size, length, expected):
    cost = model(size).estimate(Workload(batch_size, length, length), num_streams)
    assert printed(cost) == expected


def test_the_parts_of_the_memory_are_what_they_are_called():
    cost = model().estimate(Workload(2, 100, 50), 4)
    shape = load_shape("1.6B")
    per_token = 2 * 36 * shape.key_value_size * 2
    assert cost.kv_cache_bytes == 2 * 4 * 150 * per_token
    assert cost.prefix_bytes == 2 * 4 * 48 * per_token
    assert cost.aggregator_bytes == 4 * 1536 * 1537 * 2
    assert cost.memory_gib * 2**30 == pytest.approx(
        cost.weight_bytes + cost.kv_cache_bytes + cost.prefix_bytes + cost.aggregator_bytes + cost.activation_bytes
    )
    alone = model().estimate(Workload(2, 100, 50), 1)
    assert (alone.prefix_bytes, alone.aggregator_bytes, alone.aggregator_seconds) == (0, 0, 0)
    assert model(num_prefix_tokens=0).estimate(Workload(2, 100, 50), 4).prefix_bytes == 0


def test_decoding_is_bound_by_memory_and_prefill_by_arithmetic():
    workload = Workload(8, 512, 64)
    base = model().estimate(workload, 4)
    faster_memory = model(device=replace(A100, bandwidth=2 * A100.bandwidth)).estimate(workload, 4)
    faster_arithmetic = model(device=replace(A100, half_tflops=2 * A100.half_tflops)).estimate(workload, 4)
    assert faster_memory.decode_seconds < 0.6 * base.decode_seconds
    assert faster_arithmetic.decode_seconds > 0.9 * base.decode_seconds
    assert faster_arithmetic.prefill_seconds < 0.6 * base.prefill_seconds


def test_precisions_change_bytes_and_rate():
    workload = Workload(1, 64, 64)
    costs = {name: model(precision=precision).estimate(workload, 2) for name, precision in PRECISIONS.items()}
    assert costs["float16"] == costs["bfloat16"]
    assert costs["float32"].weight_bytes == 2 * costs["bfloat16"].weight_bytes
    layers = costs["bfloat16"].weight_bytes - 151936 * 1536 * 2
    assert costs["int8"].weight_bytes == layers / 2 + 151936 * 1536 * 2
    assert costs["int4"].weight_bytes == layers / 4 + 151936 * 1536 * 2
    assert costs["int4"].decode_seconds < costs["int8"].decode_seconds < costs["bfloat16"].decode_seconds
    assert costs["float32"].prefill_seconds > 4 * costs["bfloat16"].prefill_seconds


def test_a_faster_device_is_faster_and_memory_stays():
    a100, h200 = (model(device=find_device(name)).estimate(Workload(1, 128, 128), 8) for name in ("a100-80gb", "h200"))
    assert h200.latency_seconds < 0.6 * a100.latency_seconds
    assert h200.memory_gib == a100.memory_gib
    assert all(device.half_tflops > device.float32_tflops > 0 and device.memory > 0 for device in DEVICES.values())


def test_the_comparison_holds_the_loss_equal():
    workloads = square_workloads([1], [64, 128])
    comparison = compare(model(), LAW, workloads, 8)
    num_params = load_shape("1.6B").params_with_streams(8)
    assert LAW.loss(comparison.larger_params, 1) == pytest.approx(comparison.equal_loss)
    assert LAW.loss(num_params, 8) == pytest.approx(comparison.equal_loss)
    assert comparison.loss > comparison.equal_loss
    assert comparison.parallel == mean_cost(model(), workloads, 8)
    added = comparison.larger.memory_gib - comparison.backbone.memory_gib
    assert comparison.memory_ratio == pytest.approx(
        added / (comparison.parallel.memory_gib - comparison.backbone.memory_gib)
    )


def test_the_claim_of_the_paper_is_reproduced():
    best, *others = readings_of_the_paper()
    assert len(others) == 6
    assert best.worst_deviation < 0.03
    assert PUBLISHED_RATIOS == {"figure 4": (22, 6), "figure 1": (7, 1.7)}
    # All four published figures come out as printed, not only within 15%.
    assert [round(value) for value in best.ratios["figure 4"]] == [22, 6]
    assert [round(best.ratios["figure 1"][0]), round(best.ratios["figure 1"][1], 1)] == [7, 1.7]
    by_law = next(reading for reading in others if reading.name.endswith("backbone alone"))
    assert by_law.ratios["figure 4"] == pytest.approx((17.6, 5.0), rel=0.01)


def test_measured_losses_are_found_by_size_and_streams():
    losses = measured_losses("stack-v2-python")
    assert len(losses) == 24
    assert (losses["1.6B", 1], losses["1.6B", 8], losses["4.4B", 1]) == (1.0817, 1.0383, 1.0213)


def test_measured_costs_are_read_and_averaged(tmp_path):
    path = tmp_path / "decode.json"
    path.write_text(
        '{"rows": ['
        '{"num_streams": 2, "batch_size": 1, "input_len": 8, "output_len": 8, "memory_gib": 1, "latency_seconds": 2},'
        '{"num_streams": 2, "batch_size": 1, "input_len": 16, "output_len": 16, "memory_gib": 3, "latency_seconds": 4}'
        "]}"
    )
    rows = read_measured(path)
    assert mean_over_lengths(rows, [(8, 8), (16, 16)]) == [MeasuredCost(2, 1, 8, 8, 2, 3)]
    with pytest.raises(ValueError, match=r"2 streams and batch size 1 lack .* \(32, 32\)"):
        mean_over_lengths(rows, [(8, 8), (32, 32)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"is not JSON"),
        ("[]", r"has no list `rows`"),
        ('{"rows": []}', r"has no list `rows`"),
        ('{"rows": [3]}', r"row 0 must be an object"),
        ('{"rows": [{"num_streams": 0}]}', r"row 0: `num_streams` must be a positive number, got 0"),
        ('{"rows": [{"num_streams": 1.5}]}', r"row 0: `num_streams` must be a whole number, got 1.5"),
        ('{"rows": [{"num_streams": 2}]}', r"row 0: `batch_size` must be a positive number, got None"),
    ],
)
def test_bad_measurements_are_named(tmp_path, text, message):
    path = tmp_path / "decode.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_measured(path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Workload(0, 64, 64), r"`batch_size` must be at least 1, got 0"),
        (lambda: model().estimate(Workload(1, 1, 1), 0), r"streams must be at least 1, got 0"),
        (lambda: model(flops_efficiency=1.5), r"`flops_efficiency` is a share between 0 and 1, got 1.5"),
        (lambda: model(num_prefix_tokens=-1), r"`num_prefix_tokens` must be at least 0, got -1"),
        (lambda: compare(model(), LAW, square_workloads([1]), 1), r"at least 2 streams, got 1"),
        (lambda: mean_cost(model(), [], 1), r"at least one workload"),
        (lambda: find_device("a100"), r"no device is called `a100`: choose one of a100-40gb, a100-80gb, h100"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
