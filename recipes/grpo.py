"""Group relative policy optimization (GRPO) with parallel streams: answers are sampled, rewarded and learned from.

    accelerate launch recipes/grpo.py                                           # the embedded demo, no network needed
    accelerate launch recipes/grpo.py --config recipes/configs/grpo/demo.yaml --use_transformers_continuous_batching true
    accelerate launch recipes/grpo.py --config recipes/configs/grpo/qwen2.5-3b_gsm8k_frozen_p4.yaml

The data has the column `prompt` (or name another with `--prompt_field`), a text or a list of messages, and whatever
columns the reward functions read. `--reward_functions` names them, as `package.module.function` or `file.py:function`;
they are TRL's, and are tried on the first questions before weights load. Every field of `ParScaleArguments`,
`BackboneArguments`, `PromptArguments` and `StreamGRPOConfig` is an argument and a YAML key; `--help` lists them.

With `--beta`, the reference is the model as it was before this run, streams included, as in `dpo.py`.
"""

import sys
from pathlib import Path

from parscale_adapt.terminal import console
from parscale_adapt.training import (
    BackboneArguments,
    PromptArguments,
    RecipeParser,
    StreamGRPOConfig,
    StreamGRPOTrainer,
    backbone_path,
    check_run,
    finish_run,
    load_backbone_tokenizer,
    load_prompts,
    model_in_streams,
    open_run_folder,
    prepare_rollout_training,
    reference_model,
    run_identity,
    run_recipe,
    train,
)
from parscale_adapt.tuner.config import ParScaleArguments


DEMO = Path(__file__).parent / "configs" / "grpo" / "demo.yaml"


def main(
    streams: ParScaleArguments, backbone: BackboneArguments, data: PromptArguments, training: StreamGRPOConfig
) -> None:
    check_run(streams, backbone, training)
    prepare_rollout_training(training, backbone, data)
    identity = run_identity("grpo", streams, backbone, data, training)
    resume = open_run_folder(training, identity)

    path = backbone_path(backbone)
    tokenizer = load_backbone_tokenizer(path, backbone, training)
    train_prompts, heldout_prompts, reward_functions, report = load_prompts(data, tokenizer, backbone)
    if training.should_save:
        console().print(report.table())

    model = model_in_streams(path, backbone, streams, training.seed)
    trainer = StreamGRPOTrainer(
        model=model,
        reward_funcs=reward_functions,
        ref_model=reference_model(model, path, backbone, streams, training.seed) if training.beta else None,
        args=training,
        train_dataset=train_prompts,
        eval_dataset=heldout_prompts,
        processing_class=tokenizer,
    )
    train(trainer, resume)
    finish_run(trainer, streams, {**identity, "backbone": path}, report)


if __name__ == "__main__":
    parser = RecipeParser((ParScaleArguments, BackboneArguments, PromptArguments, StreamGRPOConfig))
    arguments = sys.argv[1:] or ["--config", str(DEMO)]
    run_recipe(main, parser, arguments)
