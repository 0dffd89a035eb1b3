"""Continual pretraining with parallel streams on raw text.

    accelerate launch recipes/cpt.py                                    # the embedded demo, no network needed
    accelerate launch recipes/cpt.py --config recipes/configs/cpt/qwen2.5-3b_stack_full_p4.yaml
    accelerate launch --config_file accelerate_configs/zero3.yaml recipes/cpt.py --config ... --num_streams 8

Every field of `ParScaleArguments`, `BackboneArguments`, `DataArguments` and `StreamConfig` is an argument and a YAML
key; `--help` lists them.
"""

import sys
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from parscale_adapt.data import (
    LoadedSource,
    MixtureSettings,
    PackedCollator,
    TextSource,
    build_train_dataset,
    check_rows,
    load_source,
    load_stdlib_corpus,
    pack_dataset,
)
from parscale_adapt.terminal import console
from parscale_adapt.training import (
    BackboneArguments,
    DataArguments,
    RecipeParser,
    StreamConfig,
    StreamTrainer,
    backbone_path,
    check_run,
    finish_run,
    load_backbone_tokenizer,
    open_run_folder,
    prepare_packed_training,
    run_identity,
    run_recipe,
    train,
    trainable_model,
)
from parscale_adapt.tuner.config import ParScaleArguments


DEMO = Path(__file__).parent / "configs" / "cpt" / "demo.yaml"


def training_sources(data: DataArguments) -> list[TextSource | LoadedSource]:
    """What to train on; the standard library's source files where nothing is named."""
    return data.sources() or [LoadedSource("standard library", load_stdlib_corpus()["train"])]


def num_training_rows(data: DataArguments, training: StreamConfig) -> int | None:
    """Rows that `max_steps` steps consume; None where a number of epochs decides."""
    if training.max_steps > 0:
        rows_per_step = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
        return training.max_steps * rows_per_step
    if any(source.streaming for source in data.sources()):
        raise ValueError("A streaming source has no length to count epochs of: give `--max_steps`.")
    return None


def heldout_rows(data: DataArguments, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset | None:
    """Packed rows that are never trained on, or None where the data has no held-out part."""
    source = data.heldout_source()
    if source is not None:
        documents, name = load_source(source), source.label
    elif not data.sources():
        documents, name = load_stdlib_corpus()["heldout"], "standard library"
    else:
        return None
    return pack_dataset(documents, tokenizer, max_length, data.max_heldout_rows, f"held out: {name}")


def main(streams: ParScaleArguments, backbone: BackboneArguments, data: DataArguments, training: StreamConfig) -> None:
    check_run(streams, backbone, training)
    prepare_packed_training(training, backbone)
    identity = run_identity("cpt", streams, backbone, data, training)
    resume = open_run_folder(training, identity)

    path = backbone_path(backbone)
    tokenizer = load_backbone_tokenizer(path, backbone, training)
    mixture = MixtureSettings(
        training.max_length,
        training.seed,
        max_rows=num_training_rows(data, training),
        shuffle_buffer_size=data.shuffle_buffer_size,
    )
    train_rows, report = build_train_dataset(training_sources(data), tokenizer, mixture)
    if training.should_save:
        check_rows(train_rows, tokenizer)

    model, peft_config = trainable_model(path, backbone, streams)
    trainer = StreamTrainer(
        model=model,
        args=training,
        train_dataset=train_rows,
        eval_dataset=heldout_rows(data, tokenizer, training.max_length),
        processing_class=tokenizer,
        data_collator=PackedCollator(tokenizer.pad_token_id),
        quantization_config=backbone.quantization_config() if isinstance(model, str) else None,
        peft_config=peft_config,
    )
    train(trainer, resume)
    finish_run(trainer, streams, {**identity, "backbone": path}, report)
    if training.should_save:
        console().print(report.table())


if __name__ == "__main__":
    parser = RecipeParser((ParScaleArguments, BackboneArguments, DataArguments, StreamConfig))
    arguments = sys.argv[1:] or ["--config", str(DEMO)]
    run_recipe(main, parser, arguments)
