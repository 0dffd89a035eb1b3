"""The embedded corpus, its tokenizer and its question and answer pairs."""

import sys
import sysconfig
from pathlib import Path

import pytest
from transformers import AutoTokenizer, Qwen2Config

from parscale_adapt.data import corpus_fingerprint, load_stdlib_corpus, stdlib_docstring_pairs, train_tokenizer
from parscale_adapt.data.stdlib_corpus import is_heldout
from parscale_adapt.data.stdlib_docstrings import pairs_of_module


pytestmark = pytest.mark.slow


VOCAB_SIZE = 4096


@pytest.fixture(scope="module")
def corpus():
    return load_stdlib_corpus()


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return train_tokenizer(corpus["train"]["text"], VOCAB_SIZE)


# ---- corpus


def test_corpus_is_the_library_and_nothing_else(corpus):
    root = Path(sysconfig.get_path("stdlib"))
    paths = [*corpus["train"]["path"], *corpus["heldout"]["path"]]
    assert {"textwrap.py", "json/decoder.py", "asyncio/events.py"} <= set(paths)
    for path in paths:
        folders = path.split("/")
        assert not {"test", "tests", "idle_test", "site-packages", "__pycache__", "pydoc_data"} & set(folders)
        assert not folders[0].startswith(("config-", "_sysconfigdata"))
    assert "encodings/cp1252.py" not in paths
    text = dict(zip(corpus["train"]["path"], corpus["train"]["text"]))["textwrap.py"]
    assert text == (root / "textwrap.py").read_text(encoding="utf-8")


def test_split_is_by_file_ordered_and_machine_independent(corpus):
    for name, split in corpus.items():
        assert split["path"][:] == sorted(split["path"])
        assert all(is_heldout(path) is (name == "heldout") for path in split["path"])
    # pinned: a change here changes every published held-out loss
    assert [is_heldout(path) for path in ("socket.py", "pprint.py", "textwrap.py", "a/b.py")] == [
        True,
        True,
        False,
        False,
    ]


def test_size_and_share_of_tokens(corpus, tokenizer):
    sizes = {name: sum(map(len, split["text"])) for name, split in corpus.items()}
    num_heldout_tokens = sum(map(len, tokenizer(corpus["heldout"]["text"][:])["input_ids"]))
    num_tokens = num_heldout_tokens * sum(sizes.values()) / sizes["heldout"]
    assert 2_000_000 < num_tokens < 4_000_000
    share = sizes["heldout"] / sum(sizes.values())
    assert 0.03 < share < 0.08
    if sys.version_info[:2] == (3, 11):
        assert share == pytest.approx(0.05, abs=0.005)


def test_fingerprint_depends_on_contents_order_and_boundaries():
    fingerprint = corpus_fingerprint(["ab", "c"])
    assert len(fingerprint) == 64
    assert fingerprint == corpus_fingerprint(iter(["ab", "c"]))
    assert len({fingerprint, *(corpus_fingerprint(texts) for texts in (["a", "bc"], ["c", "ab"], ["abc"], []))}) == 5


# ---- tokenizer


def test_reloaded_beside_a_qwen2_model_it_is_the_same(corpus, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    Qwen2Config(vocab_size=VOCAB_SIZE).save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == len(reloaded) == VOCAB_SIZE
    assert reloaded.eos_token_id == reloaded.pad_token_id == tokenizer.eos_token_id
    texts = [*corpus["heldout"]["text"][:5], "é e\u0301 漢字 12345\r\n\t<|im_start|>user<|im_end|><|endoftext|>"]
    assert reloaded(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    assert reloaded.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]


def test_text_survives_the_round_trip(corpus, tokenizer):
    for text in corpus["heldout"]["text"][:10]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_training_is_deterministic():
    texts = ["def f(x):\n    return x + 1\n" * 3, "class A:\n    pass\n", "import os, sys"]
    first, second = (train_tokenizer(texts, 280).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_impossible_vocabularies_are_refused():
    with pytest.raises(ValueError, match="`vocab_size` must be at least 259"):
        train_tokenizer(["hello"], 100)
    with pytest.raises(ValueError, match=r"The texts give only \d+ tokens, not 1000: use more text"):
        train_tokenizer(["hello"], 1000)


# ---- questions and answers


def test_pairs_are_many_and_sane():
    pairs = stdlib_docstring_pairs()
    assert pairs["train"].num_rows > 3000
    assert pairs["heldout"].num_rows > 100
    for split in pairs.values():
        assert split.column_names == ["prompt", "completion"]
        for row in split:
            assert row["prompt"].endswith("?")
            assert 20 <= len(row["completion"]) <= 800
            assert "\n" not in row["completion"]
    assert len(set(pairs["train"]["prompt"])) == pairs["train"].num_rows
    assert not set(pairs["train"]["prompt"]) & set(pairs["heldout"]["prompt"])
    answer = dict(zip(pairs["train"]["prompt"], pairs["train"]["completion"]))["What does `textwrap.dedent(text)` do?"]
    assert answer == "Remove any common leading whitespace from every line in `text`."


def test_pairs_of_a_module():
    text = '''"""A module with words in it.

Second paragraph."""

class Box:
    """Holds one thing and
    gives it back."""

    def put(self, thing, *, force=False):
        """Put the thing into the box."""

    def _hidden(self):
        """Not to be asked about, ever."""

async def fetch(url: str) -> bytes:
    """Fetch what is behind the address."""

def short():
    """Too short."""

def symbols():
    """>>> 1 + 1 == 2 ; [[]] {{}} 123456789 *** --- === ///"""
'''
    assert pairs_of_module("tools/box.py", text) == [
        ("What is the module `tools.box` for?", "A module with words in it."),
        ("What is the class `tools.box.Box`?", "Holds one thing and gives it back."),
        ("What does `tools.box.Box.put(thing, *, force=False)` do?", "Put the thing into the box."),
        ("What does `tools.box.fetch(url: str)` do?", "Fetch what is behind the address."),
    ]
    assert pairs_of_module("tools/__init__.py", text)[0][0] == "What is the module `tools` for?"
    assert pairs_of_module("_private/box.py", text) == []
