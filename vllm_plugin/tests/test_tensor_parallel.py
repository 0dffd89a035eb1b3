"""Two ranks on the CPU share the heads of every stream."""

import json
import os
import subprocess
import sys

import pytest


SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    folder, prompts = sys.argv[1], json.loads(sys.argv[2])
    llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=16,
              kv_cache_memory_bytes=2**27, tensor_parallel_size=2)
    parameters = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False)
    print("TOKENS", json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


def test_two_ranks_answer_as_one(four_streams, tmp_path):
    path = tmp_path / "two_ranks.py"
    path.write_text(SCRIPT)
    run = subprocess.run(
        [sys.executable, str(path), str(four_streams.folder), json.dumps(four_streams.adapted["prompts"])],
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    found = [line for line in run.stdout.splitlines() if line.startswith("TOKENS")]
    assert found, run.stdout[-3000:] + run.stderr[-3000:]
    assert json.loads(found[0].removeprefix("TOKENS")) == four_streams.adapted["tokens"]


@pytest.mark.parametrize(("num_ranks", "rank", "heads"), [(2, 0, [0]), (2, 1, [1]), (4, 2, [1]), (4, 1, [0])])
def test_a_rank_takes_its_own_heads(num_ranks, rank, heads, monkeypatch):
    import torch
    import vllm.distributed

    from parscale_vllm.attention import load_heads

    monkeypatch.setattr(vllm.distributed, "get_tensor_model_parallel_rank", lambda: rank)
    monkeypatch.setattr(vllm.distributed, "get_tensor_model_parallel_world_size", lambda: num_ranks)
    whole = torch.randn(3, 2, 5, 4)
    parameter = torch.nn.Parameter(torch.empty(3, 1, 5, 4), requires_grad=False)
    load_heads(parameter, whole)
    assert torch.equal(parameter, whole[:, heads])
