"""Direct preference optimization (DPO) with parallel streams.

    accelerate launch recipes/dpo.py                                            # the embedded demo, no network needed
    accelerate launch recipes/dpo.py --config recipes/configs/dpo/demo.yaml --adapter_name_or_path runs/sft-demo
    accelerate launch recipes/dpo.py --config recipes/configs/dpo/qwen2.5-3b_ultrafeedback_frozen_p4.yaml

The data has the columns `prompt`, `chosen` and `rejected`, or whole conversations in the latter two; name other columns
with `--prompt_field`, `--chosen_field` and `--rejected_field`. Every field of `ParScaleArguments`, `BackboneArguments`,
`PreferenceArguments` and `StreamDPOConfig` is an argument and a YAML key; `--help` lists them.

The reference is the model as it was before this run, streams included: new streams, or those of the adapter, from which
the first loss is log 2. With a frozen backbone it is a copy of the streams on the same backbone; where the backbone is or
was trained, a second model, which takes as much memory again. It is never saved: a run that goes on makes it anew.
"""

import sys
from pathlib import Path

from parscale_adapt.data import end_token_ids
from parscale_adapt.terminal import console
from parscale_adapt.training import (
    BackboneArguments,
    PreferenceArguments,
    RecipeParser,
    StreamDPOConfig,
    StreamDPOTrainer,
    backbone_path,
    check_run,
    finish_run,
    load_backbone_tokenizer,
    load_preferences,
    model_in_streams,
    open_run_folder,
    prepare_preference_training,
    reference_model,
    run_identity,
    run_recipe,
    train,
)
from parscale_adapt.tuner.config import ParScaleArguments


DEMO = Path(__file__).parent / "configs" / "dpo" / "demo.yaml"


def main(
    streams: ParScaleArguments, backbone: BackboneArguments, data: PreferenceArguments, training: StreamDPOConfig
) -> None:
    check_run(streams, backbone, training)
    prepare_preference_training(training, backbone, "dpo.py")
    identity = run_identity("dpo", streams, backbone, data, training)
    resume = open_run_folder(training, identity)

    path = backbone_path(backbone)
    tokenizer = load_backbone_tokenizer(path, backbone, training)
    ends = end_token_ids(tokenizer, path, backbone.model_revision)
    train_pairs, heldout_pairs, report = load_preferences(data, tokenizer, training, ends)
    if training.should_save:
        console().print(report.table())

    model = model_in_streams(path, backbone, streams, training.seed)
    trainer = StreamDPOTrainer(
        model=model,
        ref_model=reference_model(model, path, backbone, streams, training.seed),
        args=training,
        train_dataset=train_pairs,
        eval_dataset=heldout_pairs,
        processing_class=tokenizer,
    )
    train(trainer, resume)
    finish_run(trainer, streams, {**identity, "backbone": path}, report)


if __name__ == "__main__":
    parser = RecipeParser((ParScaleArguments, BackboneArguments, PreferenceArguments, StreamDPOConfig))
    arguments = sys.argv[1:] or ["--config", str(DEMO)]
    run_recipe(main, parser, arguments)
