"""Exports with what they must answer, and engines in this process."""

import gc
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path


# Before vLLM is imported: the engine in this process, 256 MB of cache, nothing asked of the hub.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
CACHE_BYTES = 2**28
FOLDER = Path(os.environ.get("PARSCALE_VLLM_CASES", Path(__file__).parents[1] / ".cases"))


class Case:
    """An export in `folder`, and the answers of its adapter and of its backbone."""

    def __init__(self, name: str):
        self.name = name
        self.folder = FOLDER / name / "export"
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"{self.folder} is missing: `make test-vllm` writes it with tests/write_expected.py."
            )
        expected = json.loads((FOLDER / name / "expected.json").read_text())
        self.adapted, self.backbone = expected["adapted"], expected["backbone"]


@contextmanager
def engine(folder: Path, **options):
    """A `vllm.LLM` in float32 without compilation."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "kv_cache_memory_bytes": CACHE_BYTES}
    llm = LLM(str(folder), **{**defaults, "max_num_seqs": 16, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def ask(llm, prompts, **options):
    """Answers to prompts of token ids, which come in one batch."""
    from vllm import SamplingParams

    options = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, "detokenize": False, **options}
    return llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], SamplingParams(**options), use_tqdm=False
    )


def tokens_of(outputs) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def copy_export(case: Case, target: Path, without: tuple[str, ...] = (), **changes) -> Path:
    """The export with other fields of `config.json`, those of `parscale` by their own names."""
    shutil.copytree(case.folder, target, ignore=shutil.ignore_patterns(*without))
    fields = json.loads((target / "config.json").read_text())
    for name, value in changes.items():
        place = fields["parscale"] if name in fields["parscale"] else fields
        place[name] = value
    (target / "config.json").write_text(json.dumps(fields))
    return target
