"""What tests share."""

import logging

import pytest
from engines import Case


@pytest.fixture(scope="session")
def four_streams() -> Case:
    return Case("qwen2-p4")


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """What the plugin logs in this process. vLLM takes handlers away when it sets up its own."""
    lines = []
    for level in ("info", "warning"):
        monkeypatch.setattr(
            logging.getLogger("vllm.parscale"), level, lambda text, *values: lines.append(text % values)
        )
    return lines
