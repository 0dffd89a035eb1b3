"""The Python blocks of the documents run, in order, on a tiny backbone."""

import pathlib
import pkgutil
import re

import pytest
import torch
from support.tiny_models import VOCABULARY, tiny_model
from support.tiny_tasks import tiny_for
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BatchEncoding


ROOT = pathlib.Path(__file__).parents[1]
BRITISH = re.compile(
    r"\b(?:colour|licence|behaviour|favour|neighbour|analys(?:e|ing)|\w*(?:minim|maxim|optim|normal|initial|organ|recogn|"
    r"general|special|serial|token|quant|summar|parameter|real|util|visual|standard)is(?:e|ing|ation))\w*",
    re.IGNORECASE,
)
DOCUMENTS = sorted(path.relative_to(ROOT) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))


class ByteTokenizer:
    """Just enough of a tokenizer: bytes as ids, padded on the left."""

    def __call__(self, texts, return_tensors, padding):
        rows = [[3 + byte % (VOCABULARY - 3) for byte in text.encode()] for text in texts]
        length = max(map(len, rows))
        ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
        return BatchEncoding({"input_ids": ids, "attention_mask": (ids != 0).long()})


def python_blocks(name):
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


@pytest.mark.parametrize(
    ("name", "adapters", "active"),
    [
        ("README.md", ["default", "p2", "p4", "p4-lora"], "p2"),
        ("docs/running.md", ["lora", "p2", "p4", "p8", "together"], "p8"),
    ],
)
def test_the_blocks_of_a_document_run(name, adapters, active, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: tiny_model())
    classifier = AutoModelForSequenceClassification
    monkeypatch.setattr(classifier, "from_pretrained", lambda *args, **kwargs: tiny_for("SEQ_CLS"))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: ByteTokenizer())
    blocks = python_blocks(name)
    assert len(blocks) >= 3
    names = {}
    for block in blocks:
        exec(compile(block, name, "exec"), names)
    model = names["model"]
    assert sorted(model.peft_config) == adapters
    assert model.active_adapter == active


@pytest.mark.parametrize("name", DOCUMENTS, ids=str)
def test_links_between_documents_lead_somewhere(name):
    text = (ROOT / name).read_text()
    targets = re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#[^)]*)?\)", text)
    assert not [target for target in targets if target and not (ROOT / name).parent.joinpath(target).exists()]


@pytest.mark.parametrize("name", DOCUMENTS, ids=str)
def test_what_a_document_names_in_the_repository_is_there(name):
    """Paths in backquotes, and dotted names of the package's modules and of what they hold."""
    text = (ROOT / name).read_text()
    paths = re.findall(r"`((?:parscale_adapt|recipes|scripts|benchmarks|tests|docs)/[\w./-]*)`", text)
    assert not [path for path in paths if not (ROOT / path).exists()]
    for dotted in re.findall(r"parscale_adapt(?:\.[a-z_0-9]+)+", text):
        pkgutil.resolve_name(dotted)


@pytest.mark.parametrize("name", DOCUMENTS, ids=str)
def test_python_blocks_are_python(name):
    for block in python_blocks(name):
        compile(block, str(name), "exec")


@pytest.mark.parametrize("name", DOCUMENTS, ids=str)
def test_documents_keep_to_american_spelling(name):
    assert BRITISH.findall((ROOT / name).read_text()) == []
