import pytest
from support.scored_material import ScoredMaterial


@pytest.fixture(scope="session")
def scored(tmp_path_factory):
    """Tiny models, tasks and texts, shared by the tests of this folder."""
    return ScoredMaterial(tmp_path_factory.mktemp("scored"))
