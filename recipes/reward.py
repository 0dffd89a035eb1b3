"""A reward model with parallel streams, trained on preference pairs.

    accelerate launch recipes/reward.py                                         # the embedded demo, no network needed
    accelerate launch recipes/reward.py --config recipes/configs/reward/demo.yaml --adapter_name_or_path runs/sft-demo
    accelerate launch recipes/reward.py --config recipes/configs/reward/qwen2.5-3b_ultrafeedback_frozen_p4.yaml

The backbone gets a head of one label in place of its LM head; it is trained with the streams, whose mixture it sees, and
saved with them. An adapter to go on with may be one of reward.py, or of a causal LM, whose head is left out. The data is
that of dpo.py. Every field of `ParScaleArguments`, `BackboneArguments`, `PreferenceArguments` and `StreamRewardConfig` is
an argument and a YAML key; `--help` lists them.
"""

import sys
from pathlib import Path

from peft import TaskType

from parscale_adapt.data import end_token_ids, with_questions
from parscale_adapt.terminal import console
from parscale_adapt.training import (
    BackboneArguments,
    PreferenceArguments,
    RecipeParser,
    StreamRewardConfig,
    StreamRewardTrainer,
    backbone_path,
    check_run,
    finish_run,
    load_backbone_tokenizer,
    load_preferences,
    model_in_streams,
    open_run_folder,
    prepare_preference_training,
    run_identity,
    run_recipe,
    train,
)
from parscale_adapt.tuner.config import ParScaleArguments


DEMO = Path(__file__).parent / "configs" / "reward" / "demo.yaml"


def main(
    streams: ParScaleArguments, backbone: BackboneArguments, data: PreferenceArguments, training: StreamRewardConfig
) -> None:
    check_run(streams, backbone, training)
    prepare_preference_training(training, backbone, "reward.py")
    identity = run_identity("reward", streams, backbone, data, training)
    resume = open_run_folder(training, identity)

    path = backbone_path(backbone)
    tokenizer = load_backbone_tokenizer(path, backbone, training)
    ends = end_token_ids(tokenizer, path, backbone.model_revision)
    train_pairs, heldout_pairs, report = load_preferences(data, tokenizer, training, ends)
    if training.should_save:
        console().print(report.table())

    trainer = StreamRewardTrainer(
        model=model_in_streams(path, backbone, streams, training.seed, TaskType.SEQ_CLS),
        args=training,
        train_dataset=with_questions(train_pairs),
        eval_dataset=None if heldout_pairs is None else with_questions(heldout_pairs),
        processing_class=tokenizer,
    )
    train(trainer, resume)
    finish_run(trainer, streams, {**identity, "backbone": path}, report)


if __name__ == "__main__":
    parser = RecipeParser((ParScaleArguments, BackboneArguments, PreferenceArguments, StreamRewardConfig))
    arguments = sys.argv[1:] or ["--config", str(DEMO)]
    run_recipe(main, parser, arguments)
