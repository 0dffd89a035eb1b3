"""Loss on text: that of each document read alone, whatever rows and batches it comes in."""

import json

import pytest
import torch
from datasets import Dataset

from parscale_adapt.data import pack_documents
from parscale_adapt.evaluation import EvaluationSettings
from parscale_adapt.evaluation.texts import LOSS, text_losses


LENGTHS = (20, 1, 7, 30, 12)  # all fit in a row of 512 tokens


@pytest.fixture(scope="module")
def documents(scored):
    """Token ids of documents, as texts in a file."""
    texts = ["def f(x): return x + 1 " * (length // 4 + 1) for length in LENGTHS]
    path = scored.root / "documents.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    return path, texts


def measure(scored, path, **changes):
    entry = {"name": "own", "path": str(path), "text_field": "body"}
    settings = EvaluationSettings(**scored.settings(scored.root / "unused", tasks=[], texts=[entry], **changes))
    (found,) = text_losses(settings, scored.tokenizer)
    return found


@torch.no_grad()
def losses_alone(model, tokenizer, texts):
    """(nats, tokens) of each text, read in one piece with its end token."""
    found = []
    for text in texts:
        tokens = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])
        log_probs = model(tokens).logits[0, :-1].double().log_softmax(-1)
        found.append((-log_probs.gather(1, tokens[0, 1:, None]).sum().item(), tokens.shape[1] - 1))
    return found


def test_the_loss_is_that_of_documents_read_alone(scored, documents):
    path, texts = documents
    model = scored.adapted("two")
    expected = losses_alone(model, scored.tokenizer, texts)
    for batch_size in (1, 8):
        found = measure(scored, path, max_length=512, batch_size=batch_size).score(model, scored.tokenizer, 1)
        for item, (nats, tokens) in zip(found.items, expected, strict=True):
            assert item["nats"] == pytest.approx(nats, rel=1e-6)
            assert item["tokens"] == tokens
        value = sum(nats for nats, _ in expected) / sum(tokens for _, tokens in expected)
        assert found.metrics[LOSS].value == pytest.approx(value, abs=1e-5)
        assert found.metrics[LOSS].num_items == len(texts)
        assert found.metrics[LOSS].interval is not None


def test_documents_that_go_on_in_the_next_row_stay_one_item(scored, documents):
    path, texts = documents
    tokenizer = scored.tokenizer
    found = measure(scored, path, max_length=16).score(scored.plain(), tokenizer, 1)
    tokens = [len(tokenizer(text).input_ids) for text in texts]  # all with the end token, but for each first
    assert [item["tokens"] for item in found.items] == tokens
    rows = list(pack_documents([[*tokenizer(text).input_ids, 0] for text in texts], 16))
    assert len(rows) > len(texts)


def test_of_a_single_document_rows_are_resampled(scored, documents, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"body": " ".join(documents[1])}) + "\n")
    found = measure(scored, path, max_length=32).score(scored.plain(), scored.tokenizer, 1)
    assert {*found.items[0]} == {"row", "nats", "tokens"}
    assert found.metrics[LOSS].num_items == len(found.items) > 3
    assert found.metrics[LOSS].interval is not None


def test_the_loss_is_what_a_recipe_measures_while_it_trains(scored, documents, tmp_path):
    """TRL's trainer on the same packed rows, as the recipes set it up."""
    from trl import SFTConfig

    from parscale_adapt.data import PackedCollator, pack_dataset
    from parscale_adapt.training import StreamTrainer

    path, texts = documents
    rows = pack_dataset(Dataset.from_dict({"text": texts}), scored.tokenizer, 64)
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        max_length=64,
        per_device_eval_batch_size=2,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    trainer = StreamTrainer(
        model=scored.adapted("two"),
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=scored.tokenizer,
        data_collator=PackedCollator(scored.tokenizer.pad_token_id),
    )
    found = measure(scored, path, max_length=64).score(scored.adapted("two"), scored.tokenizer, 1)
    assert found.metrics[LOSS].value == pytest.approx(trainer.heldout_loss(), abs=1e-5)


def test_a_limit_takes_the_first_documents(scored, documents):
    found = measure(scored, documents[0], limit=2).score(scored.plain(), scored.tokenizer, 1)
    assert len(found.items) == 2
