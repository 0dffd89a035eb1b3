"""A tiny model with adapters, for the page's tests."""

import pytest
from support.chat_material import ChatMaterial

from parscale_adapt.page.answers import Answers
from parscale_adapt.serving.loading import find_speaker, load_speaker


@pytest.fixture(scope="session")
def chat_material(tmp_path_factory):
    return ChatMaterial(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="session")
def answers(chat_material):
    """The backbone with adapters of two and of four streams."""
    adapters = [str(chat_material.root / name) for name in ("two", "four")]
    return Answers(*load_speaker(find_speaker(str(chat_material.root / "backbone"), adapters=adapters)))
