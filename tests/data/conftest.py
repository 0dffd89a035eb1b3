import pytest
from support.tiny_tokenizers import byte_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    """For tests that don't change it."""
    return byte_tokenizer()
