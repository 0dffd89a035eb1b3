"""How the demo launches what it trains; the training itself is that of the recipes."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def demo(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    import demo

    return demo


@pytest.mark.parametrize(("of_user", "expected"), [(None, "1"), ("2", "2")])
def test_a_variant_runs_once_with_one_thread_unless_the_user_says_otherwise(
    demo, monkeypatch, tmp_path, of_user, expected
):
    launched = []

    def launch(command, check, env):
        launched.append((command, env))
        output = Path(command[command.index("--output_dir") + 1])
        output.mkdir()
        (output / "metrics.json").write_text(json.dumps({"heldout_loss": 3.0}))

    monkeypatch.setattr(subprocess, "run", launch)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if of_user is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", of_user)
    for _ in range(2):
        assert demo.run_variant(tmp_path, "P1_full", seed=3, start="tokens") == {"heldout_loss": 3.0}
    ((command, environment),) = launched
    assert environment["OMP_NUM_THREADS"] == expected
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert command[0] == sys.executable
    given = dict(itertools.pairwise(command))
    assert (given["--seed"], given["--num_streams"], given["--init_weights"]) == ("3", "1", "tokens")
    assert given["--output_dir"] == str(tmp_path / "P1_full_tokens_seed3")
