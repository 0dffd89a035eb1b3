"""docs/evidence.md says what its table says, and the page of a finished table has every section and picture."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model

from parscale_adapt import ParScaleConfig
from parscale_adapt.analysis.fit import fit_law
from parscale_adapt.analysis.runs import read_runs


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
    from evidence_plan import experiments, sweep_plan
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

    swept = [row(run, seed) for run, seed in sweep_plan()]
    return [row(run, seed) for run, seed in experiments(swept, 3)], swept


@pytest.fixture
def lab():
    """Rows that follow equation 5 exactly."""
    from law_lab import COLUMNS, SIZES, STREAMS

    rows = []
    for size, num_params in zip(SIZES, (1e5, 3e5, 1.2e6)):
        for count in STREAMS:
            loss = (1e6 / (num_params * (0.3 * math.log(count) + 1))) ** 0.2 + 1.5
            given = {"size": size, "num_streams": count, "status": "finished", "num_params": num_params, "loss": loss}
            given |= {
                "tokens": 10**6,
                "machine": "CPU",
                "rho": 0.99 if count > 1 else "",
                "backbone_params": int(num_params),
            }
            rows.append({column: str(given.get(column, "")) for column in COLUMNS})
    return rows


@pytest.fixture
def decoding(page):
    """P streams take P times the backbone's time less 1 ms at a context of 64, and P times at 1,024."""
    steps = [
        {
            "num_streams": count,
            "cache": cache,
            "input_len": length,
            "ms_per_token": 10.0 * count - (length == 64) * (count > 1),
        }
        for count in (1, 2, 4, 8)
        for cache in ("dynamic", "static")
        for length in (64, 1024)
    ]
    rows = [{**step, "memory_gib": 0.5 * step["num_streams"]} for step in steps if step["cache"] == "dynamic"]
    return page.Decoding({"machine": "CPU", "arguments": {"output_len": 16}, "steps": steps, "rows": rows})


def test_the_page_is_what_the_tables_give(page):
    assert page.PAGE.read_text(encoding="utf-8") == page.page_text(page.Tables.read(page.TABLES)), (
        "run `python scripts/evidence_page.py`"
    )


def test_the_readme_shows_the_same_tables(page):
    results = page.Results(*(page.read_rows(page.TABLES / name) for name in ("runs.csv", "sweeps.csv")))
    text = page.README.read_text(encoding="utf-8")
    assert text == page.readme.with_evidence(text, page.readme_section(results)), (
        "run `python scripts/evidence_page.py`"
    )


def test_the_readme_of_a_finished_table_has_each_pair_and_its_difference(page, finished):
    text = page.readme_section(page.Results(*finished))
    assert text.count("nats") + text.count("neither better nor worse") >= 6
    assert "| LoRA r=12 | 3.50M |" in text
    assert "- 4 streams against LoRA r=12: 0.0500 nats better [" in text
    assert "3 seeds" in text
    with pytest.raises(ValueError, match="once each"):
        page.readme.with_evidence("a readme without marks", text)


def test_a_difference_is_paired_by_document(page, finished):
    results = page.Results(*finished)
    difference = results.difference("streams4", "lora12")
    assert difference.mean == pytest.approx(-0.05, abs=1e-9)
    assert difference.low < -0.05 < difference.high
    unpaired = results.difference("streams4", "lora23")
    assert unpaired.high - unpaired.low > difference.high - difference.low
    same = results.difference("lora12", "lora12")
    assert same.low < 0 < same.high


def test_an_interval_is_that_of_documents_too(page, finished):
    """With one seed there is nothing else to draw."""
    rows, swept = finished
    results = page.Results([row for row in rows if row["seed"] == "0"], swept)
    difference = results.difference("streams4", "lora23")
    assert difference.low < difference.mean < difference.high


def test_what_is_forgotten_is_what_the_loss_rose_by(page, finished):
    rows, swept = finished
    rows = [{**row, "loss_chat": "2.3", "loss_gsm8k": "1.9"} if row["name"] == "lora12" else row for row in rows]
    results = page.Results(rows, swept)
    assert results.forgetting("lora12", "chat") == pytest.approx(0.3)
    assert results.forgetting("lora12") == pytest.approx((0.3 - 0.1) / 3)


def test_finished_tables_have_every_section(page, finished, lab, decoding, tmp_path):
    rows, swept = finished
    with_table(lab, tmp_path)
    text = page.page_text(page.Tables(rows, swept, lab, [], decoding, tmp_path))
    for heading in (
        "on top of a LoRA",
        "Streams alone",
        "Which learning rate",
        "Price",
        "The law in the small",
        "Every row",
    ):
        assert heading in text
    assert "What was not run" not in text
    assert "| 4 streams | `streams4` | 3.50M | 3 |" in text
    assert "| 4 streams | 39 (3.90) | 40 (4.00) | 2.00 GiB | 2.00 GiB |" in text
    assert "Four streams are" in text
    assert "0.0500 nats better" in text  # than the LoRA of the same size, as the fixture has it
    without = [row for row in rows if row["name"] not in ("streams8", "lora8_4x_tokens")]
    text = page.page_text(page.Tables(without, swept))
    assert "2 of 33 experiments wait for more hours" in text
    assert "`streams8`" in text
    assert "(1 more of these answers wait for their runs.)" in text
    assert "The law in the small" not in text


def test_the_law_section_has_the_fit_of_its_rows(page, lab, tmp_path):
    import evidence_law

    with_table(lab, tmp_path)
    fitted = evidence_law.fits(tmp_path / "law_lab.csv")
    text = evidence_law.section(lab, fitted)
    assert fitted["log"].law.k == pytest.approx(0.3, abs=0.01)
    assert "k = 0.30" in text
    assert "explains 100.0% of the variance" in text
    assert evidence_law.picture(fitted["log"]).axes
    noisy = [{**row, "loss": str(float(row["loss"]) + 0.3 * (-1) ** i)} for i, row in enumerate(lab)]
    with_table(noisy, tmp_path)
    assert "explains only" in evidence_law.section(noisy, evidence_law.fits(tmp_path / "law_lab.csv"))


def test_the_law_section_says_where_more_streams_did_not_help(page, lab, tmp_path):
    import evidence_law

    def loss(row):
        return (1e6 / float(row["num_params"])) ** 0.2 + 1.5 + 0.01 * int(row["num_streams"])

    worse = [{**row, "loss": str(loss(row))} for row in lab]
    with_table(worse, tmp_path)
    runs = read_runs(str(tmp_path / "law_lab.csv"))
    text = evidence_law.section(worse, {form: fit_law(runs, form, num_bootstrap=2) for form in ("log", "diversity")})
    assert "**They don't show that P helps**" in text
    assert "P=2: +0.010, +0.010, +0.010; P=4: +0.030, +0.030, +0.030; P=8: +0.070, +0.070, +0.070" in text
    assert "with 1 to 10 tokens for each parameter" in text
    assert "The streams' gain of equation 5 is" not in text


def with_table(lab, folder):
    """Write the rows of the lab to a folder."""
    with open(folder / "law_lab.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, lab[0])
        writer.writeheader()
        writer.writerows(lab)


@pytest.mark.parametrize(("gain", "words"), [(0.001, "too little to build it"), (0.02, "worth building")])
def test_the_hybrid_section_has_the_gain_of_its_rows(page, gain, words):
    import evidence_hybrid

    rows = [
        {"state_rate": rate, "seed": str(seed), "loss": str(4.5 + 0.01 * seed - gain * (rate == "0.01"))}
        for rate in ("", "0.001", "0.01")
        for seed in range(3)
    ]
    text = evidence_hybrid.section(
        [{**row, "backbone_loss": "4.6", "trained_params": "9", "tokens": "1"} for row in rows]
    )
    assert words in text
    assert f"The best rate gains {gain:.4f} nats" in text
    assert f"| prefixes and start states, rate 0.01 | 9 | {4.51 - gain:.4f} | {gain:+.4f} to {gain:+.4f} |" in text


def test_start_states_of_zero_change_nothing_and_each_stream_has_its_own(page):
    import hybrid_states

    model = get_peft_model(
        hybrid_states.new_backbone(), ParScaleConfig(num_streams=hybrid_states.NUM_STREAMS, num_prefix_tokens=3)
    ).eval()
    ids = torch.arange(40).view(2, 20)
    before = model(input_ids=ids).logits
    start = hybrid_states.StartStates(model)
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=0)
    assert len(start.states) == 3
    seen = []
    for stream in range(hybrid_states.NUM_STREAMS):
        with torch.no_grad():
            for state in start.states:
                state.zero_()[stream] = 1.0
        seen.append(model(input_ids=ids).logits)
        assert not torch.equal(seen[-1], before)
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        ((-0.02, -0.03, -0.01), "0.0200 nats better"),
        ((0.02, 0.01, 0.03), "0.0200 nats worse"),
        ((-0.02, -0.05, 0.01), "neither better nor worse"),
    ],
)
def test_a_difference_is_called_what_its_interval_allows(page, interval, words):
    from evidence_figures import Difference

    assert page.prose.verdict(Difference(*interval)).startswith(words)


def test_pictures_of_a_finished_table(page, finished, tmp_path):
    page.write_pictures(page.Results(*finished), tmp_path)
    for name in ("loss_by_streams", "forgetting", "price"):
        assert (tmp_path / f"evidence_{name}.png").read_bytes().startswith(b"\x89PNG")


def test_training_arithmetic_counts_streams_and_what_is_trained(page):
    row = {"method": "parscale", "num_streams": "4", "num_params": "100"}
    assert page.training_arithmetic(row, 10) == 4 * 100 * 10 * 4
    assert page.training_arithmetic({**row, "method": "prefix_tuning"}, 10) == 4 * 100 * 10
    assert page.training_arithmetic({**row, "method": "full", "num_streams": "1"}, 10) == 6 * 100 * 10
