import itertools

import pytest
import torch

from parscale_adapt.core.layout import MixedLayout, UniformLayout


ADAPTERS, STREAMS = ["four", None, "two", "four"], [4, 1, 2, 4]
ROWS = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 2), (1, 3), (2, 0), (2, 3), (3, 0), (3, 3)]  # stream, sample

P, B, T, HEADS, SIZE = 3, 2, 4, 2, 6


def test_folding_puts_the_heads_of_stream_p_at_p_times_heads():
    rows = torch.randn(P * B, HEADS, T, SIZE)
    folded = UniformLayout(P).to_heads(rows)
    assert folded.shape == (B, P * HEADS, T, SIZE)
    for stream, sample, head in itertools.product(range(P), range(B), range(HEADS)):
        assert torch.equal(folded[sample, stream * HEADS + head], rows[stream * B + sample, head])


@pytest.mark.parametrize("shape", [(HEADS, T, SIZE), (HEADS,), (HEADS, T)])
def test_unfolding_undoes_folding(shape):
    rows = torch.randn(P * B, *shape)
    assert torch.equal(UniformLayout(P).to_rows(UniformLayout(P).to_heads(rows)), rows)


def test_outputs_of_attention_become_rows_again():
    rows = torch.randn(P * B, HEADS, T, SIZE)
    output = UniformLayout(P).to_heads(rows).transpose(1, 2)
    result = UniformLayout(P).output_to_rows(output)
    assert torch.equal(result, rows.transpose(1, 2))
    assert result.is_contiguous()


def mixed():
    return MixedLayout(ADAPTERS, STREAMS, torch.device("cpu"))


def test_a_mixed_batch_has_a_row_for_every_stream_of_every_sample_stream_major():
    samples = torch.randn(4, 3)
    rows = mixed().replicate(samples)
    assert torch.equal(rows, torch.stack([samples[sample] for _, sample in ROWS]))


def test_streams_of_a_mixed_batch_stand_side_by_side_as_heads():
    rows = torch.randn(len(ROWS), 2, 5, 3)
    heads = mixed().to_heads(rows)
    assert heads.shape == (4, 4 * 2, 5, 3)
    for row, (stream, sample) in zip(rows, ROWS):
        assert torch.equal(heads[sample, 2 * stream : 2 * stream + 2], row)
    assert heads[1, 2:].eq(0).all()
    assert torch.equal(mixed().to_rows(heads), rows)


def test_groups_name_the_samples_and_rows_of_every_adapter():
    groups = {group.adapter: group for group in mixed().groups}
    assert list(groups) == ["four", None, "two"]
    for adapter, group in groups.items():
        assert group.samples.tolist() == [sample for sample, name in enumerate(ADAPTERS) if name == adapter]
        assert group.rows.tolist() == [row for row, (_, sample) in enumerate(ROWS) if ADAPTERS[sample] == adapter]
        assert group.num_streams == STREAMS[group.samples[0]]


@pytest.mark.parametrize("method", ["replicate", "to_heads"])
def test_a_mixed_layout_of_equal_samples_is_the_uniform_one(method):
    uniform, layout = UniformLayout(3), MixedLayout(["a", "a"], [3, 3], torch.device("cpu"))
    states = torch.randn(2 if method == "replicate" else 6, 4, 5, 7)
    arranged = getattr(uniform, method)(states)
    assert torch.equal(getattr(layout, method)(states), arranged)
    if method == "to_heads":
        assert torch.equal(uniform.to_rows(arranged), layout.to_rows(arranged))
    assert uniform.count_samples(6) == layout.count_samples(6) == 2
