import pytest


@pytest.fixture(scope="module")
def tuned(recipes, material):
    """Adapters that sft.py wrote, frozen and full, by `train_backbone`."""
    return {
        full: recipes.run("sft", **material.sft_options(train_backbone=full, max_steps=2)).check()
        for full in (False, True)
    }
