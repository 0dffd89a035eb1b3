"""Instruction tuning with parallel streams, loss on the answer only.

    accelerate launch recipes/sft.py                                            # the embedded demo, no network needed
    accelerate launch recipes/sft.py --adapter_name_or_path runs/cpt-demo       # go on from what cpt.py wrote
    accelerate launch recipes/sft.py --config recipes/configs/sft/qwen2.5-3b_gsm8k_frozen_p4.yaml

The data is conversational (`messages`), or has the columns `prompt` and `completion`; name other columns with
`--prompt_field` and `--completion_field`, and look at it first with `parscale inspect-data`. `--train_on all_answers`
trains every answer of a conversation. Every field of `ParScaleArguments`, `BackboneArguments`,
`InstructionArguments` and `StreamConfig` is an argument and a YAML key; `--help` lists them.
"""

import sys
from pathlib import Path

from parscale_adapt.data import check_rows, end_token_ids
from parscale_adapt.terminal import console
from parscale_adapt.training import (
    BackboneArguments,
    InstructionArguments,
    RecipeParser,
    StreamConfig,
    StreamTrainer,
    backbone_path,
    check_run,
    finish_run,
    load_backbone_tokenizer,
    load_instructions,
    open_run_folder,
    prepare_instruction_training,
    run_identity,
    run_recipe,
    train,
    trainable_model,
)
from parscale_adapt.tuner.config import ParScaleArguments


DEMO = Path(__file__).parent / "configs" / "sft" / "demo.yaml"


def main(
    streams: ParScaleArguments, backbone: BackboneArguments, data: InstructionArguments, training: StreamConfig
) -> None:
    check_run(streams, backbone, training)
    prepare_instruction_training(training, backbone)
    identity = run_identity("sft", streams, backbone, data, training)
    resume = open_run_folder(training, identity)

    path = backbone_path(backbone)
    tokenizer = load_backbone_tokenizer(path, backbone, training)
    ends = end_token_ids(tokenizer, path, backbone.model_revision)
    train_rows, heldout_rows, report = load_instructions(data, tokenizer, training, ends)
    if training.should_save:
        console().print(report.table())
        check_rows(train_rows, tokenizer, max_length=training.max_length, end_token_ids=ends)

    model, peft_config = trainable_model(path, backbone, streams)
    trainer = StreamTrainer(
        model=model,
        args=training,
        train_dataset=train_rows,
        eval_dataset=heldout_rows,
        processing_class=tokenizer,
        quantization_config=backbone.quantization_config() if isinstance(model, str) else None,
        peft_config=peft_config,
    )
    train(trainer, resume)
    finish_run(trainer, streams, {**identity, "backbone": path}, report)


if __name__ == "__main__":
    parser = RecipeParser((ParScaleArguments, BackboneArguments, InstructionArguments, StreamConfig))
    arguments = sys.argv[1:] or ["--config", str(DEMO)]
    run_recipe(main, parser, arguments)
