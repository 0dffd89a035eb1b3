"""Tokenizers as backbones bring them: completed where something is missing, refused where it can't be."""

import pytest
from support.tiny_tokenizers import byte_tokenizer
from transformers import GenerationConfig, PreTrainedTokenizerFast

from parscale_adapt.data import (
    CHATML,
    TokenizerSettings,
    check_vocabulary,
    end_token_ids,
    load_tokenizer,
    set_chat_template,
)


@pytest.fixture
def save(tmp_path):
    """Saves a tokenizer with some special tokens only, and gives its folder."""

    def run(name="tokenizer", template=None, **tokens):
        byte_tokenizer().save_pretrained(tmp_path / "bytes")
        file = str(tmp_path / "bytes" / "tokenizer.json")
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=file, **tokens)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return run


END, START = "<|endoftext|>", "<|im_start|>"


def test_a_missing_padding_token_is_lent(save):
    assert load_tokenizer(save(eos_token=END)).pad_token == END
    assert load_tokenizer(save(eos_token=END, pad_token=START)).pad_token == START


def test_tokens_that_are_asked_for_are_taken(save):
    tokenizer = load_tokenizer(save(eos_token=END), TokenizerSettings(eos_token="<|im_end|>", pad_token=START))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", START)
    assert load_tokenizer(save(), TokenizerSettings(eos_token=END)).pad_token == END


@pytest.mark.parametrize("name", ["eos_token", "pad_token"])
def test_a_token_that_is_none_is_refused(save, name):
    with pytest.raises(ValueError, match=f"`{name}` must be a token of the tokenizer of .*, got '<end>': give one of"):
        load_tokenizer(save(eos_token=END), TokenizerSettings(**{name: "<end>"}))


def test_a_tokenizer_without_an_end_token_is_refused(save):
    with pytest.raises(
        ValueError, match="has no end token, so nothing would end: name one of its tokens with --eos_token"
    ):
        load_tokenizer(save(pad_token=END))


def test_a_folder_without_a_tokenizer_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=f"The tokenizer of {tmp_path} can't be loaded: ") as raised:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_a_tokenizer_that_transformers_makes_up_is_refused(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>"}'
    )
    with pytest.raises(ValueError, match=r"has no vocabulary: copy its files there, such as tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    def fail(*arguments, **options):
        raise ImportError("X requires the SentencePiece library but it was not found.\nInstall it.")

    monkeypatch.setattr("parscale_adapt.data.tokenizers.AutoTokenizer.from_pretrained", fail)
    with pytest.raises(
        ValueError, match=r"needs a package that is not installed: .*SentencePiece library .* Install it\."
    ):
        load_tokenizer(str(tmp_path))


# ---- chat templates


def test_a_template_comes_from_a_file_or_from_another_tokenizer(save, tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text("file")
    other = save("other", template="other", eos_token=END)
    path = save(template="own", eos_token=END)
    for given, template in ((None, "own"), (str(file), "file"), (other, "other")):
        assert load_tokenizer(path, TokenizerSettings(chat_template_path=given)).chat_template == template


def test_a_template_with_tokens_that_the_backbone_lacks_is_refused(save, tmp_path):
    foreign = byte_tokenizer()
    foreign.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    foreign.chat_template = "<|turn|>{{ messages[0].content }}"
    foreign.save_pretrained(tmp_path / "foreign")
    settings = TokenizerSettings(chat_template_path=str(tmp_path / "foreign"))
    with pytest.raises(ValueError, match=r"writes <\|turn\|>, which the backbone's tokenizer has not as tokens"):
        load_tokenizer(save(eos_token=END), settings)


def test_templates_that_can_not_be_read_are_refused(save, tmp_path):
    path = save(eos_token=END)
    with pytest.raises(ValueError, match=r"The chat template missing\.jinja does not exist; looked from"):
        load_tokenizer(path, TokenizerSettings(chat_template_path="missing.jinja"))
    with pytest.raises(ValueError, match="has no chat template: name one that has, or a Jinja file"):
        load_tokenizer(path, TokenizerSettings(chat_template_path=path))
    (tmp_path / "latin.jinja").write_bytes(b"\xe9")
    with pytest.raises(ValueError, match="must be a Jinja file in UTF-8"):
        load_tokenizer(path, TokenizerSettings(chat_template_path=str(tmp_path / "latin.jinja")))


def test_chatml_is_for_tokenizers_that_have_none(tmp_path):
    tokenizer = byte_tokenizer()
    set_chat_template(tokenizer, None)
    assert tokenizer.chat_template == CHATML
    tokenizer.chat_template = "own"
    set_chat_template(tokenizer, None)
    assert tokenizer.chat_template == "own"
    (tmp_path / "file.jinja").write_text("file")
    set_chat_template(tokenizer, str(tmp_path / "file.jinja"))
    assert tokenizer.chat_template == "file"


# ---- what fits to the backbone


@pytest.mark.parametrize(("stored", "ids"), [(None, {0}), (2, {0, 2}), ([2, 1], {0, 1, 2})])
def test_answers_end_where_generation_does(tmp_path, stored, ids):
    GenerationConfig(eos_token_id=stored).save_pretrained(tmp_path)
    assert end_token_ids(byte_tokenizer(), str(tmp_path)) == ids


def test_without_a_backbone_answers_end_with_the_tokenizers_end_token(tmp_path):
    assert end_token_ids(byte_tokenizer(), None) == end_token_ids(byte_tokenizer(), str(tmp_path)) == {0}


def test_each_token_needs_a_row_of_the_embedding():
    tokenizer = byte_tokenizer()
    check_vocabulary(tokenizer, len(tokenizer), "backbone")
    tokenizer.add_tokens(["<new>", "<newer>"])
    with pytest.raises(
        ValueError,
        match=r"has 2 token\(s\) beyond the 261 rows of the embedding, the last is '<newer>' with the id 262",
    ):
        check_vocabulary(tokenizer, 261, "backbone")
