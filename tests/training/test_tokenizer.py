"""A backbone's files and its tokenizer: what is wrong with them is said before any weight loads, with the file."""

import json
import pathlib
import shutil
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from parscale_adapt.training import BackboneArguments, load_backbone_tokenizer


DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "data.md"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5000000000\n"


def rewrite(name, change):
    """A fault: a file of the backbone, changed."""

    def apply(folder):
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return apply


def change_tokenizer(change):
    """A fault: the backbone's tokenizer, changed."""

    def apply(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        change(tokenizer)
        tokenizer.save_pretrained(folder)

    return apply


def forget_end_token(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["eos_token"] = None
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def pickle_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


# As the document calls them.
FAULTS = {
    "`model.safetensors` is a pointer of git-lfs": rewrite("model.safetensors", lambda _: POINTER.encode()),
    "`tokenizer.json` is a pointer of git-lfs": rewrite("tokenizer.json", lambda _: POINTER.encode()),
    "`model.safetensors` was cut": rewrite("model.safetensors", lambda content: content[:-100]),
    "`tokenizer.json` was cut": rewrite("tokenizer.json", lambda content: content[:100]),
    "`config.json` is missing": lambda folder: (folder / "config.json").unlink(),
    "the weights are missing": lambda folder: (folder / "model.safetensors").unlink(),
    "the weights are a pickle": pickle_weights,
    "the tokenizer has more tokens than the embedding": change_tokenizer(lambda one: one.add_tokens(["<new>"])),
    "the tokenizer has no end token": forget_end_token,
    "the tokenizer is missing": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
}


def load(path, **options):
    backbone = BackboneArguments(
        **{name: options.pop(name) for name in list(options) if name in vars(BackboneArguments())}
    )
    fields = {"eos_token": None, "pad_token": None, "chat_template_path": None, "trust_remote_code": False}
    training = SimpleNamespace(**{**fields, **options})
    return load_backbone_tokenizer(str(path), backbone, training), training


@pytest.fixture
def backbone(material, tmp_path):
    return pathlib.Path(shutil.copytree(material.backbone, tmp_path / "backbone"))


def documented():
    """The lines of the table below the heading Backbones."""
    section = DOCUMENT.read_text().split("\n## Backbones\n")[1].split("\n## ")[0]
    rows = [row.strip("| ").split(" | ") for row in section.splitlines() if row.startswith("| ")]
    return {fault: sentence for fault, sentence in rows if fault != "fault"}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_said_as_the_document_says(backbone, fault):
    FAULTS[fault](backbone)
    with pytest.raises(ValueError, match="backbone") as raised:
        load(backbone)
    sentence = " ".join(str(raised.value).split()).replace(str(backbone), "BACKBONE")
    assert sentence == documented()[fault]


def test_the_document_knows_no_others():
    assert documented().keys() == FAULTS.keys()


def test_a_sound_backbone_passes(backbone):
    tokenizer, _ = load(backbone, pad_token="<|im_end|>")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|im_end|>")


def test_a_template_is_taken_out_of_the_arguments_since_trl_would_resize_the_embedding(backbone, tmp_path):
    (tmp_path / "own.jinja").write_text("own")
    tokenizer, training = load(backbone, chat_template_path=str(tmp_path / "own.jinja"))
    assert tokenizer.chat_template == "own"
    assert training.chat_template_path is None


def test_an_adapter_that_is_a_pointer_is_refused(backbone, tmp_path):
    (tmp_path / "adapter_model.safetensors").write_text(POINTER)
    with pytest.raises(
        ValueError, match=r"adapter_model\.safetensors is a pointer of git-lfs and not the file: run `git"
    ):
        load(backbone, adapter_name_or_path=str(tmp_path))


def test_a_missing_package_is_named(backbone, monkeypatch):
    monkeypatch.setattr("parscale_adapt.training.tokenizer.is_bitsandbytes_available", lambda: False)
    with pytest.raises(
        ValueError, match=r"`load_in_4bit` needs the package bitsandbytes, .* 'parscale_adapt\[quantization\]'"
    ):
        load(backbone, load_in_4bit=True)
