"""Settings that the recipes put into TRL's arguments."""

import pytest
from datasets import Dataset
from support.tiny_models import tiny_model, with_streams
from support.trainers import word_tokenizer
from trl import SFTConfig

from parscale_adapt.data import PackedCollator
from parscale_adapt.training import BackboneArguments, StreamTrainer, prepare_packed_training


def packed_arguments(folder, **options):
    return SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_length=4,
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
        **options,
    )


def test_packed_rows_are_trained_in_the_order_of_the_mixture(tmp_path):
    training = packed_arguments(tmp_path)
    prepare_packed_training(training, BackboneArguments())
    training.model_init_kwargs = None  # the model is loaded already
    firsts = list(range(3, 15))
    trainer = StreamTrainer(
        model=with_streams(tiny_model()),
        args=training,
        train_dataset=Dataset.from_list([{"input_ids": [first] * 4, "seq_lengths": [4]} for first in firsts]),
        processing_class=word_tokenizer(),
        data_collator=PackedCollator(0),
    )
    trained = [row[0].item() for batch in trainer.get_train_dataloader() for row in batch["input_ids"]]
    assert trained == firsts


@pytest.mark.parametrize("option", ["packing", "padding_free"])
def test_packing_by_trl_is_refused(tmp_path, option):
    with pytest.raises(ValueError, match=f"`{option}` has no effect in cpt.py, got True: rows are packed already"):
        prepare_packed_training(packed_arguments(tmp_path, **{option: True}), BackboneArguments())
