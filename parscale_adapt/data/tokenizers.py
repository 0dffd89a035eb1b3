"""A backbone's tokenizer as training needs it: with an end token, a padding token and, if asked for, a chat template."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from .chat_template import CHATML
from .tokenization import end_token_of


_JINJA = (".jinja", ".jinja2", ".j2", ".txt")


@dataclass(frozen=True)
class TokenizerSettings:
    """What to change about a tokenizer.

    Args:
        revision: branch, tag or commit of a hub repository.
        eos_token: the end token, one of its vocabulary.
        pad_token: the padding token, one of its vocabulary.
        chat_template_path: file with a Jinja chat template, or folder or hub name of a tokenizer that has one.
        trust_remote_code: run code that comes with the tokenizer.
    """

    revision: str = "main"
    eos_token: str | None = None
    pad_token: str | None = None
    chat_template_path: str | None = None
    trust_remote_code: bool = False


def load_tokenizer(path: str, settings: TokenizerSettings | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer and give it what it lacks.

    Without a padding token it lends its end token: what is padded is never attended to, and never trained.

    Raises:
        ValueError: it can't be loaded, has no end token, or lacks a token that is asked for.
    """
    settings = settings or TokenizerSettings()
    tokenizer = _open(path, settings.revision, settings.trust_remote_code)
    for name in ("eos_token", "pad_token"):
        token = getattr(settings, name)
        if token is not None:
            if token not in tokenizer.get_vocab():
                raise ValueError(
                    f"`{name}` must be a token of the tokenizer of {path}, got {token!r}: give one of its vocabulary."
                )
            setattr(tokenizer, name, token)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer of {path} has no end token, so nothing would end: name one of its tokens with --eos_token."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if settings.chat_template_path is not None:
        tokenizer.chat_template = _read_template(settings.chat_template_path, tokenizer)
    return tokenizer


def set_chat_template(tokenizer: PreTrainedTokenizerBase, file: str | None) -> None:
    """Give a tokenizer the chat template of a Jinja file; without one, its own stays, or it gets ChatML.

    Raises:
        ValueError: there is no such file.
    """
    if file is not None:
        tokenizer.chat_template = _read_template(file, tokenizer)
    elif tokenizer.chat_template is None:
        tokenizer.chat_template = CHATML


def end_token_ids(tokenizer: PreTrainedTokenizerBase, path: str | None, revision: str = "main") -> frozenset[int]:
    """Tokens at which generation stops: the tokenizer's end token, and those of the backbone's generation settings.

    Args:
        tokenizer: has an end token.
        path: folder or hub name of the backbone, which may have no such settings.
        revision: branch, tag or commit of a hub repository.
    """
    more = None if path is None else _end_of_generation(path, revision)
    return frozenset({end_token_of(tokenizer)[1], *([more] if isinstance(more, int) else more or [])})


def _end_of_generation(path: str, revision: str) -> int | list[int] | None:
    try:
        return GenerationConfig.from_pretrained(path, revision=revision).eos_token_id
    except OSError:  # there is no such file, so that generation asks the model's configuration
        pass
    try:
        config = AutoConfig.from_pretrained(path, revision=revision)
    except (OSError, ValueError):  # a tokenizer without a model
        return None
    return getattr(config.get_text_config(), "eos_token_id", None)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, num_embeddings: int, path: str) -> None:
    """Refuse a tokenizer with tokens that have no row in the embedding.

    Raises:
        ValueError: there are some.
    """
    largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest[1] >= num_embeddings:
        num_more = sum(token >= num_embeddings for token in tokenizer.get_vocab().values())
        raise ValueError(
            f"The tokenizer of {path} has {num_more} token(s) beyond the {num_embeddings} rows of the embedding, the last is "
            f"{largest[0]!r} with the id {largest[1]}: take the tokenizer that belongs to the backbone, or save the backbone "
            "with `resize_token_embeddings` first."
        )


def _open(path: str, revision: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except ImportError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"The tokenizer of {path} needs a package that is not installed: {reason}") from error
    except Exception as error:  # the readers of tokenizers raise whatever they find, also plain `Exception`
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"The tokenizer of {path} can't be loaded: {reason}") from error
    if tokenizer.get_vocab().keys() <= tokenizer.get_added_vocab().keys():  # made up by transformers, of no file
        raise ValueError(f"The tokenizer of {path} has no vocabulary: copy its files there, such as tokenizer.json.")
    return tokenizer


def _read_template(path: str, tokenizer: PreTrainedTokenizerBase) -> str:
    file = Path(path).expanduser()
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8-sig")
        except UnicodeError as error:
            raise ValueError(f"The chat template {path} must be a Jinja file in UTF-8: {error}.") from error
    if file.suffix in _JINJA:
        raise ValueError(f"The chat template {path} does not exist; looked from {Path.cwd()}.")
    source = _open(path, "main", trust_remote_code=False)
    if source.chat_template is None:
        raise ValueError(f"The tokenizer of {path} has no chat template: name one that has, or a Jinja file.")
    template = source.get_chat_template()
    foreign = [token for token in source.get_added_vocab() if token in template and token not in tokenizer.get_vocab()]
    if foreign:
        raise ValueError(
            f"The chat template of {path} writes {', '.join(sorted(foreign))}, which the backbone's tokenizer has not as "
            "tokens: take another template, or a Jinja file with tokens of the backbone."
        )
    return template
