"""TRL's GRPOTrainer with what parallel streams add."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel
from trl import GRPOTrainer
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer import utils

from .rewards import RewardFunction
from .rollout_training import RolloutTraining


def mean_rewards(rewards: torch.Tensor, weights: torch.Tensor, names: Sequence[str]) -> dict[str, float]:
    """Means over questions, as `heldout_metrics` has them.

    Args:
        rewards: float32 `[questions, functions]`, NaN where a function had nothing to say. A question to which none had
            anything to say is left out, as TRL leaves it out in training.
        weights: of the functions.
        names: of the functions.
    """
    rewards = rewards[~rewards.isnan().all(dim=1)]
    means: dict[str, float] = {}
    if len(rewards):
        means["reward"] = (rewards * weights).nansum(dim=1).mean().item()
    means["num_questions"] = len(rewards)
    if len(names) > 1:
        columns = {name: column[~column.isnan()] for name, column in zip(names, rewards.T, strict=True)}
        means |= {f"reward of {name}": column.mean().item() for name, column in columns.items() if len(column)}
    return means


class StreamGRPOTrainer(RolloutTraining, GRPOTrainer):
    """[`trl.GRPOTrainer`] for a `PeftModel` with ParScale streams under the name "default".

    With `beta`, the reference is the model as it is when the trainer is made, streams included: a frozen copy of the
    streams on the same backbone, or `ref_model` where the backbone is trained.

    Raises:
        ValueError: the backbone is trained, `beta` is given and no reference; or as in [`StreamTraining`].
    """

    loss_label = "GRPO loss (per token)"
    curve = "reward"
    curve_label = "mean reward of the answers"
    generation_config: GenerationConfig
    generation_kwargs: dict[str, Any]

    def __init__(
        self,
        model: PeftModel,
        reward_funcs: list[RewardFunction],
        ref_model: PreTrainedModel | None = None,
        **kwargs: Any,
    ):
        args = kwargs["args"]
        if args.beta and ref_model is None and model.peft_config["default"].train_backbone:
            raise ValueError(
                "`train_backbone=True` changes the backbone, which a reference can't share then: give a `ref_model` of its "
                "own, or `beta=0`, which compares with none."
            )
        beta = args.beta
        args.beta = 0.0 if ref_model is not None else beta  # TRL would copy the streams, which can't hold the backbone
        super().__init__(model, reward_funcs, **kwargs)
        args.beta = self.beta = beta
        if ref_model is not None and beta:
            self.ref_model = self._prepared_reference(ref_model)

    @property
    def _batches_per_sampling(self) -> int:
        return self.args.steps_per_generation * self.num_iterations

    def _prepared_reference(self, model: PreTrainedModel) -> torch.nn.Module:
        """As TRL prepares a reference that it makes itself."""
        if self.args.disable_dropout:
            utils.disable_dropout_in_model(model)
        if hasattr(utils, "add_fused_lm_head"):  # TRL before 1.16 reads the head's weight itself
            utils.add_fused_lm_head(
                model, temperature=self.temperature, cast_lm_head_to_fp32=self.args.cast_lm_head_to_fp32
            )
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(model, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(model, self.accelerator)
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    @torch.no_grad()
    def heldout_loss(self) -> None:
        """Reward greedy answers to the held-out questions; `heldout_metrics` gets the means, since no loss tells anything.

        Every rank must call it, and answers its share.
        """
        rows = list(self.eval_dataset)
        was_training = self.model.training
        self.model.eval()
        rewards: list[list[float]] = []
        num_per_batch = self.args.eval_batch_size * self.accelerator.num_processes
        with self._answering_greedily():
            for start in range(0, len(rows), num_per_batch):
                batch = rows[start : start + num_per_batch]
                with self.accelerator.split_between_processes(batch, apply_padding=True) as share:
                    rewards += self._rewards_of(share)[: len(batch)]
        self.model.train(was_training)
        self._metrics["eval"].clear()
        self.heldout_metrics = mean_rewards(torch.tensor(rewards), self.reward_weights.cpu(), self.reward_func_names)

    def _rewards_of(self, rows: list[dict[str, Any]]) -> list[list[float]]:
        """Rewards of an answer to each row, of all ranks, by function."""
        prompts = [row["prompt"] for row in rows]
        _, completion_ids, _, completions, *_ = self._generate(prompts)
        return self._calculate_rewards(rows, prompts, completions, completion_ids).tolist()

    @contextmanager
    def _answering_greedily(self) -> Iterator[None]:
        config, settings = self.generation_config, self.generation_kwargs
        self.generation_config = copy.deepcopy(config)
        self.generation_config.do_sample = False
        self.generation_kwargs = {**settings, "do_sample": False}
        try:
            yield
        finally:
            self.generation_config, self.generation_kwargs = config, settings
