"""Tokens of one answer to pieces of text, as they come."""

from transformers import PreTrainedTokenizerBase


_HALF_A_CHARACTER = "\N{REPLACEMENT CHARACTER}"
_KEPT = 6  # tokens before a new one that can change how it is written


class TextPieces:
    """Turns one token after the other into the text that it adds. A token that ends amid a character adds nothing; the
    one that completes it adds the whole.

    Args:
        tokenizer: of the tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._said = 0  # of the kept tokens' text, characters that were given out

    def add(self, token: int) -> str:
        """The text that a token adds; nothing for special ones."""
        self._tokens.append(token)
        text = self._text()
        if text.endswith(_HALF_A_CHARACTER):
            return ""
        piece, self._said = text[self._said :], len(text)
        if len(self._tokens) > 2 * _KEPT:
            del self._tokens[:-_KEPT]
            self._said = len(self._text())
        return piece

    def _text(self) -> str:
        return self._tokenizer.decode(self._tokens, skip_special_tokens=True)
