"""Distill many streams into few, teacher and student on one backbone in memory: pay for P while training, not while serving.

    accelerate launch recipes/distill.py                                        # the embedded demo, no network needed
    accelerate launch recipes/distill.py --config recipes/configs/distill/demo.yaml --num_streams 1 --lora '{"r": 8}'
    accelerate launch recipes/distill.py --config recipes/configs/distill/qwen2.5-3b_gsm8k_p4_to_p2.yaml

The student is new streams, or an adapter to go on with; with `--num_streams 1 --lora '{"r": 8}'` it is a LoRA. It
learns the teacher's distributions on answers that it samples itself, or with `--train_on_data true` on those of the data,
which is that of `sft.py`. The backbone is frozen. Every field of `ParScaleArguments`, `BackboneArguments`,
`InstructionArguments` and `StreamDistillationConfig` is an argument and a YAML key; `--help` lists them.
"""

import sys
from pathlib import Path

from parscale_adapt.data import end_token_ids
from parscale_adapt.terminal import console
from parscale_adapt.training import (
    BackboneArguments,
    InstructionArguments,
    RecipeParser,
    StreamDistillationConfig,
    StreamDistillationTrainer,
    add_teacher,
    backbone_path,
    check_run,
    finish_run,
    load_backbone_tokenizer,
    load_instructions,
    model_in_streams,
    open_run_folder,
    prepare_distillation,
    run_identity,
    run_recipe,
    teacher_path,
    train,
    with_answers,
)
from parscale_adapt.tuner.config import ParScaleArguments


DEMO = Path(__file__).parent / "configs" / "distill" / "demo.yaml"


def main(
    streams: ParScaleArguments,
    backbone: BackboneArguments,
    data: InstructionArguments,
    training: StreamDistillationConfig,
) -> None:
    check_run(streams, backbone, training)
    prepare_distillation(training, backbone, streams, data)
    identity = run_identity("distill", streams, backbone, data, training)
    resume = open_run_folder(training, identity)

    path = backbone_path(backbone)
    teacher = teacher_path(training.teacher_model_name_or_path, backbone)
    tokenizer = load_backbone_tokenizer(path, backbone, training)
    ends = end_token_ids(tokenizer, path, backbone.model_revision)
    train_rows, heldout_rows, report = load_instructions(data, tokenizer, training, ends)
    if training.should_save:
        console().print(report.table())

    model = model_in_streams(path, backbone, streams, training.seed)
    trainer = StreamDistillationTrainer(
        model=model,
        teacher=add_teacher(model, teacher, backbone),
        args=training,
        train_dataset=with_answers(train_rows),
        eval_dataset=None if heldout_rows is None else with_answers(heldout_rows),
        processing_class=tokenizer,
    )
    train(trainer, resume)
    finish_run(trainer, streams, {**identity, "backbone": path, "teacher": teacher}, report)


if __name__ == "__main__":
    parser = RecipeParser((ParScaleArguments, BackboneArguments, InstructionArguments, StreamDistillationConfig))
    arguments = sys.argv[1:] or ["--config", str(DEMO)]
    run_recipe(main, parser, arguments)
