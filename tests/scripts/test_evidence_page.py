"""docs/evidence.md says what its table says, and the page of a finished table has every section and picture."""

import json
from pathlib import Path

import numpy as np
import pytest


ROOT = Path(__file__).parents[2]
NUM_DOCUMENTS = 12


@pytest.fixture
def page(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import evidence_page

    return evidence_page


@pytest.fixture
def finished(page):
    """Rows of every experiment with three seeds. The losses of `streams4` are those of `lora12` less 0.05 in each
    document; all others are drawn."""
    import evidence
    from evidence_plan import experiments, sweeps
    from evidence_rows import COLUMNS, FINISHED

    generator = np.random.default_rng(0)

    def row(experiment, seed):
        documents = np.random.default_rng([seed, len(experiment.name)]).normal(2.0, 0.1, NUM_DOCUMENTS)
        if experiment.name in ("streams4", "lora12"):
            documents = np.random.default_rng(seed).normal(2.0, 0.1, NUM_DOCUMENTS)
            documents -= 0.05 * (experiment.name == "streams4")
        curve = [[1024 * point, 2.5 - point / 10] for point in (1, 2, 4)]
        filled = {
            **evidence._described(experiment, seed),
            "status": FINISHED,
            "heldout_loss": documents.mean(),
            "loss_per_document": json.dumps(documents.tolist()),
            "tuning_loss_before": 2.5,
            "tuning_loss": generator.normal(2.4, 0.01),
            **{f"loss_{kind}": 2.0 for kind in page.ENGLISH},
            "num_params": 1.4e8,
            "trained_params": 3.5e6,
            "curve": json.dumps(curve),
        }
        return {column: str(filled.get(column, "")) for column in COLUMNS}

    rows = [row(run, 0) for family in sweeps().values() for run in family]
    return rows + [row(run, seed) for run, seed in experiments(rows, 3)]


def test_the_page_is_what_the_table_gives(page):
    assert page.PAGE.read_text(encoding="utf-8") == page.page_text(page.read_rows(page.TABLE)), (
        "run `python scripts/evidence_page.py`"
    )


def test_a_difference_is_paired_by_document(page, finished):
    results = page.Results(finished)
    difference = results.difference("streams4", "lora12")
    assert difference.mean == pytest.approx(-0.05, abs=1e-9)
    assert difference.low < -0.05 < difference.high
    unpaired = results.difference("streams4", "lora23")
    assert unpaired.high - unpaired.low > difference.high - difference.low
    same = results.difference("lora12", "lora12")
    assert same.low < 0 < same.high


def test_an_interval_is_that_of_documents_too(page, finished):
    """With one seed there is nothing else to draw."""
    results = page.Results([row for row in finished if row["seed"] == "0"])
    difference = results.difference("streams4", "lora23")
    assert difference.low < difference.mean < difference.high


def test_what_is_forgotten_is_what_the_loss_rose_by(page, finished):
    rows = [{**row, "loss_chat": "2.3", "loss_gsm8k": "1.9"} if row["name"] == "lora12" else row for row in finished]
    results = page.Results(rows)
    assert results.forgetting("lora12", "chat") == pytest.approx(0.3)
    assert results.forgetting("lora12") == pytest.approx((0.3 - 0.1) / 3)


def test_a_finished_table_has_every_section(page, finished):
    text = page.page_text(finished)
    for heading in ("on top of a LoRA", "Streams alone", "Which learning rate", "Price", "Every row"):
        assert heading in text
    assert "What was not run" not in text
    assert "| 4 streams | 3.50M |" in text
    without = [row for row in finished if row["name"] != "streams8"]
    assert "1 of 30 experiments wait for more time on a GPU: `streams8`." in page.page_text(without)


def test_pictures_of_a_finished_table(page, finished, tmp_path):
    page.write_pictures(page.Results(finished), tmp_path)
    for name in ("loss_by_streams", "forgetting", "price"):
        assert (tmp_path / f"evidence_{name}.png").read_bytes().startswith(b"\x89PNG")


def test_training_arithmetic_counts_streams_and_what_is_trained(page):
    row = {"method": "parscale", "num_streams": "4", "num_params": "100"}
    assert page.training_arithmetic(row, 10) == 4 * 100 * 10 * 4
    assert page.training_arithmetic({**row, "method": "prefix_tuning"}, 10) == 4 * 100 * 10
    assert page.training_arithmetic({**row, "method": "full", "num_streams": "1"}, 10) == 6 * 100 * 10
