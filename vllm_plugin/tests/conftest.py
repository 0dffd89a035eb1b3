"""What tests share."""

import logging

import pytest
from engines import Case


@pytest.fixture(scope="session")
def four_streams() -> Case:
    return Case("qwen2-p4")


@pytest.fixture
def caplog_vllm(caplog):
    """What vLLM logs in this process; its logger hands nothing on by itself."""
    import vllm.logger  # noqa: F401  (sets its handlers anew)

    logger = logging.getLogger("vllm")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
