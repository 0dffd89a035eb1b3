"""What the recipes share: arguments, checks, the trainer's additions, saves that prove themselves, reports.

Names are imported on first use, so that a part that needs little, such as the callback, does not load the others.
"""

from ..deferred import lazy_names


_MODULES = {
    "BackboneArguments": "arguments",
    "DataArguments": "arguments",
    "InstructionArguments": "instructions",
    "PreferenceArguments": "preferences",
    "PromptArguments": "rollouts",
    "RecipeParser": "parsing",
    "StreamConfig": "stream_config",
    "StreamDPOConfig": "stream_config",
    "StreamDPOTrainer": "preference_trainers",
    "StreamDistillationConfig": "stream_config",
    "StreamDistillationTrainer": "distillation_trainer",
    "StreamGRPOConfig": "stream_config",
    "StreamGRPOTrainer": "grpo_trainer",
    "StreamRewardConfig": "stream_config",
    "StreamRewardTrainer": "preference_trainers",
    "StreamStatisticsCallback": "stream_statistics",
    "StreamTrainer": "trainer",
    "add_teacher": "loading",
    "backbone_path": "launch",
    "check_run": "checks",
    "final_stream_states": "diversity",
    "finish_run": "report",
    "load_backbone_tokenizer": "tokenizer",
    "load_instructions": "instructions",
    "load_preferences": "preferences",
    "load_prompts": "rollouts",
    "model_in_streams": "loading",
    "open_run_folder": "launch",
    "parameter_groups": "learning_rates",
    "prepare_distillation": "distillation",
    "prepare_instruction_training": "instructions",
    "prepare_packed_training": "checks",
    "prepare_preference_training": "preferences",
    "prepare_rollout_training": "rollouts",
    "prepare_training": "checks",
    "reference_model": "loading",
    "run_identity": "identity",
    "run_recipe": "launch",
    "teacher_path": "launch",
    "train": "launch",
    "trainable_model": "loading",
    "with_answers": "distillation",
}

__all__ = [*_MODULES]
__getattr__, __dir__ = lazy_names(__name__, _MODULES)
