"""The case that most tests share."""

import pytest
from engines import Case


@pytest.fixture(scope="session")
def four_streams() -> Case:
    return Case("qwen2-p4")
