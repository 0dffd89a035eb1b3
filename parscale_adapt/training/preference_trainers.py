"""TRL's trainers on preference pairs, DPO and reward models, with what parallel streams add."""

from collections import defaultdict
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from trl import DPOTrainer, RewardTrainer

from .stream_training import StreamTraining


class PreferenceTraining(StreamTraining):
    """How a loss on pairs is measured on held-out ones."""

    metrics_of_pairs: ClassVar[dict[str, str]]  # what the trainer logs, and its name in `heldout_metrics`

    @torch.no_grad()
    def heldout_loss(self) -> float:
        """Mean loss per pair over the evaluation pairs, as it is trained; `heldout_metrics` gets what else is known.

        Every rank must call it, and sees all pairs.
        """
        model = self.model_wrapped
        was_training = model.training
        model.eval()
        totals: dict[str, float] = defaultdict(float)
        num_pairs = 0
        for batch in DataLoader(
            self.eval_dataset, batch_size=self.args.eval_batch_size, collate_fn=self.data_collator
        ):
            inputs = self._prepare_inputs(batch)
            self._metrics["eval"].clear()
            loss = self.compute_loss(model, inputs)
            count = len(inputs["input_ids"]) // 2
            num_pairs += count
            totals["loss"] += loss.item() * count
            for name, key in self.metrics_of_pairs.items():
                totals[key] += self._metrics["eval"][name][0] * count
        self._metrics["eval"].clear()
        model.train(was_training)
        means = {key: total / num_pairs for key, total in totals.items()}
        loss_per_pair = means.pop("loss")
        self.heldout_metrics = {**means, "num_pairs": num_pairs}
        return loss_per_pair


class StreamDPOTrainer(PreferenceTraining, DPOTrainer):
    """[`trl.DPOTrainer`] for a model with ParScale streams.

    Without a `ref_model`, the reference is a frozen copy of the streams as they are when the trainer is made, on the same
    backbone; the model must be a `PeftModel` then, its adapter be named "default", and its backbone frozen.

    Raises:
        ValueError: the backbone is trained and no reference is given, or as in [`StreamTraining`].
    """

    loss_label = "DPO loss (nats per pair)"
    metrics_of_pairs: ClassVar = {"rewards/accuracies": "accuracy", "rewards/margins": "margin"}

    def __init__(self, model: Any, ref_model: Any = None, *args, **kwargs):
        config = getattr(model, "peft_config", {}).get("default")
        if ref_model is None and config is not None and config.train_backbone:
            raise ValueError(
                "`train_backbone=True` changes the backbone, which a reference can't share then: give a `ref_model` of its own."
            )
        super().__init__(model, ref_model, *args, **kwargs)

    def _prepare_dataset(self, dataset: Dataset, *args, **kwargs) -> Dataset:
        """Prepare as TRL does what isn't token ids yet."""
        if {"prompt_ids", "chosen_ids", "rejected_ids"} <= set(dataset.column_names or ()):
            return dataset
        return super()._prepare_dataset(dataset, *args, **kwargs)


class StreamRewardTrainer(PreferenceTraining, RewardTrainer):
    """[`trl.RewardTrainer`] for a classifier with ParScale streams and one label, whose head is trained with them."""

    loss_label = "reward loss (nats per pair)"
    loader = "AutoPeftModelForSequenceClassification"
    pipeline_tag = "text-classification"
    metrics_of_pairs: ClassVar = {"accuracy": "accuracy", "margin": "margin"}
