"""Instruction tuning: the answer alone is trained, from a backbone or from the streams that cpt.py wrote."""

import json
import pathlib

import pytest
import torch
from support.recipe_runs import REPOSITORY, reloaded_logits


GSM8K = pathlib.Path(__file__).parents[1] / "material" / "gsm8k.jsonl"


def trained_texts(result, tokenizer):
    """The text of each row's trained tokens, over all batches; they must lie together."""
    texts = []
    for batch in result.batches():
        for ids, labels in zip(batch["input_ids"], batch["labels"]):
            places = [place for place, label in enumerate(labels) if label != -100]
            assert places == list(range(places[0], places[-1] + 1))
            assert [ids[place] for place in places] == [labels[place] for place in places]
            texts.append(tokenizer.decode([ids[place] for place in places]))
    return texts


def rows_of(path):
    return [json.loads(line) for line in open(path)]


def check_saved(result):
    """The folder holds what was trained."""
    torch.testing.assert_close(reloaded_logits(result.output_dir), result.logits(), rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def pretrained(recipes, material):
    """Adapters that cpt.py wrote, frozen and full, by `train_backbone`."""
    return {
        full: recipes.run("cpt", **material.cpt_options(train_backbone=full, max_steps=2)).check()
        for full in (False, True)
    }


@pytest.mark.parametrize("full", [False, True], ids=["frozen", "full"])
def test_only_the_answers_are_trained(recipes, material, full):
    heldout = {"heldout_dataset": material.questions, "max_heldout_rows": 8}
    options = material.sft_options(learning=True, max_steps=6, train_backbone=full, **heldout)
    result = recipes.run("sft", **options).check()
    answers = {f"{row['completion']}<|endoftext|>\n" for row in rows_of(material.questions)}
    assert set(trained_texts(result, material.tokenizer())) == answers
    check_saved(result)


def test_of_a_conversation_the_last_answer_is_trained(recipes, material):
    options = material.sft_options(dataset_name=material.conversations, learning=True, max_steps=6)
    result = recipes.run("sft", **options).check()
    answers = {f"{row['messages'][-1]['content']}<|endoftext|>\n" for row in rows_of(material.conversations)}
    assert set(trained_texts(result, material.tokenizer())) == answers


@pytest.mark.parametrize("sft_full", [False, True], ids=["then_frozen", "then_full"])
@pytest.mark.parametrize("cpt_full", [False, True], ids=["frozen", "full"])
def test_the_same_streams_go_on(recipes, material, pretrained, cpt_full, sft_full):
    before = pretrained[cpt_full].tensors
    options = material.sft_options(
        adapter_name_or_path=pretrained[cpt_full].output_dir,
        num_streams=None,
        num_prefix_tokens=None,
        train_backbone=sft_full,
        heldout_dataset=material.questions,
        learning_rate=1e-6,
        max_steps=2,
    )
    after = recipes.run("sft", **options).check()
    own = {name for name in before if "parscale_" in name}
    backbone = after.tensors.keys() - own
    assert own <= after.tensors.keys()
    assert bool(backbone) == (cpt_full or sft_full)
    assert all(0 < (after.tensors[name] - before[name]).abs().max() < 1e-4 for name in own)
    if cpt_full:
        moved = [not torch.equal(after.tensors[name], before[name]) for name in backbone]
        assert all(moved) if sft_full else not any(moved)
    check_saved(after)


def test_the_shipped_config_goes_on_with_its_own_number_of_streams(recipes, material):
    streams = {"num_streams": 4, "num_prefix_tokens": 16, "init_weights": "tokens"}
    before = recipes.run("cpt", **material.cpt_options(max_steps=1, **streams)).check()
    config = REPOSITORY / "recipes" / "configs" / "sft" / "demo.yaml"
    options = material.sft_options(config=config, adapter_name_or_path=before.output_dir, max_steps=1)
    result = recipes.run("sft", **{**options, "num_streams": None, "num_prefix_tokens": None}).check()
    assert result.adapter_config["num_streams"] == result.metrics["num_streams"] == 4
    assert result.tensors.keys() == before.tensors.keys()


def test_real_questions(recipes, material):
    options = material.sft_options(
        dataset_name=GSM8K, prompt_field="question", completion_field="answer", learning=True, max_length=1024
    )
    result = recipes.run("sft", **options).check()
    answers = {f"{row['answer']}<|endoftext|>\n" for row in rows_of(GSM8K)}
    assert set(trained_texts(result, material.tokenizer())) <= answers
    assert len(result.losses) == 4
