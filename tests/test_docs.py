"""The Python blocks of the documents run, in order, on a tiny backbone."""

import pathlib
import re

import pytest
import torch
from support.tiny_models import VOCABULARY, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding


DOCS = pathlib.Path(__file__).parents[1] / "docs"


class ByteTokenizer:
    """Just enough of a tokenizer: bytes as ids, padded on the left."""

    def __call__(self, texts, return_tensors, padding):
        rows = [[3 + byte % (VOCABULARY - 3) for byte in text.encode()] for text in texts]
        length = max(map(len, rows))
        ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
        return BatchEncoding({"input_ids": ids, "attention_mask": (ids != 0).long()})


@pytest.mark.parametrize("name", ["running.md"])
def test_the_blocks_of_a_document_run(name, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: tiny_model())
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: ByteTokenizer())
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)
    assert len(blocks) >= 3
    names = {}
    for block in blocks:
        exec(compile(block, name, "exec"), names)
    model = names["model"]
    assert sorted(model.peft_config) == ["lora", "p2", "p4", "p8"]
    assert model.active_adapter == "p8"
