import pytest
from support.tokenizers import byte_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    """For tests that don't change it."""
    return byte_tokenizer()
