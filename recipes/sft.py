"""Instruction tuning with parallel streams, loss on the answer only.

    accelerate launch recipes/sft.py                                            # the embedded demo, no network needed
    accelerate launch recipes/sft.py --adapter_name_or_path runs/cpt-demo       # go on from what cpt.py wrote
    accelerate launch recipes/sft.py --config recipes/configs/sft/qwen2.5-3b_gsm8k_frozen_p4.yaml

The data is conversational (`messages`), or has the columns `prompt` and `completion`; name other columns with
`--prompt_field` and `--completion_field`. Every field of `ParScaleArguments`, `BackboneArguments`,
`InstructionArguments` and `trl.SFTConfig` is an argument and a YAML key; `--help` lists them.
"""

import sys
from pathlib import Path

from transformers import AutoTokenizer
from trl import SFTConfig, TrlParser

from parscale_adapt.data import check_rows
from parscale_adapt.training import (
    BackboneArguments,
    InstructionArguments,
    StreamTrainer,
    backbone_path,
    check_run,
    finish_run,
    load_instructions,
    open_run_folder,
    prepare_instruction_training,
    run_identity,
    run_recipe,
    trainable_model,
)
from parscale_adapt.tuner.config import ParScaleArguments


DEMO = Path(__file__).parent / "configs" / "sft" / "demo.yaml"


def main(
    streams: ParScaleArguments, backbone: BackboneArguments, data: InstructionArguments, training: SFTConfig
) -> None:
    check_run(streams, backbone, training)
    prepare_instruction_training(training, backbone)
    identity = run_identity("sft", streams, backbone, data, training)
    resume = open_run_folder(training, identity)

    path = backbone_path(backbone)
    tokenizer = AutoTokenizer.from_pretrained(path, revision=backbone.model_revision)
    train_rows, heldout_rows = load_instructions(data, tokenizer)
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
    if training.should_save:
        check_rows(trainer.train_dataset, tokenizer, allow_truncated=training.max_length is not None)
    trainer.train(resume_from_checkpoint=resume)
    finish_run(trainer, streams, {**identity, "backbone": path})


if __name__ == "__main__":
    parser = TrlParser((ParScaleArguments, BackboneArguments, InstructionArguments, SFTConfig))
    arguments = sys.argv[1:] or ["--config", str(DEMO)]
    run_recipe(main, parser, arguments)
