"""TRL's DistillationTrainer with teacher and student on one backbone, in one place of memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import PretrainedConfig
from trl import DistillationTrainer
from trl.trainer.utils import pad, use_adapter

from .rollout_training import RolloutTraining


class StreamDistillationTrainer(RolloutTraining, DistillationTrainer):
    """[`trl.DistillationTrainer`] whose student and teacher are two adapters of one `PeftModel`.

    Args:
        model: with the student as its active adapter, which is trained, and the teacher beside it; the backbone is frozen.
        teacher: the teacher's name in `model`.
        **kwargs: as for TRL's trainer. Rows of the datasets have `prompt` and `completion_ids`, both lists of token ids;
            with `args.train_on_data` the latter are what is compared, else what the student answers.

    Raises:
        ValueError: the backbone is trained; or as in [`StreamTraining`].
    """

    loss_label = "divergence from the teacher (nats per token)"

    def __init__(self, model: PeftModel, teacher: str, **kwargs: Any):
        if model.peft_config[model.active_adapter].train_backbone:
            raise ValueError(
                "`train_backbone=True` would change the backbone that the teacher runs on: distill into a frozen one."
            )
        super().__init__(model, **kwargs)
        self._teacher_name = teacher
        self.teacher_model = _ResidentTeacher(model)
        self._given_answers: list[list[int]] = []

    def _get_last_hidden_state(self, unwrapped_model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """TRL's; the teacher's come from the student's model, under the teacher's adapter."""
        if unwrapped_model is not self.teacher_model:
            return super()._get_last_hidden_state(unwrapped_model, *args, **kwargs)
        with self._teaching() as model:
            return super()._get_last_hidden_state(model, *args, **kwargs)

    @contextmanager
    def _teaching(self) -> Iterator[PeftModel]:
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        try:
            with use_adapter(model, self._teacher_name):
                yield model
        finally:
            model.train(was_training)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._given_answers = [row["completion_ids"] for row in inputs]
        return super()._generate_and_score_completions(inputs)

    def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return prompts, None, {}  # they are token ids

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.train_on_data:
            return self._given_answers
        return super()._generate_single_turn(*args, **kwargs)

    @torch.no_grad()
    def heldout_loss(self) -> float:
        """Mean divergence from the teacher over the tokens of the held-out answers, as it is trained; `heldout_metrics`
        gets the cross-entropy of student and teacher on the same tokens, in nats.

        Every rank must call it, and sees all rows.
        """
        model = self.model_wrapped
        was_training = model.training
        model.eval()
        totals, num_tokens = torch.zeros(3, dtype=torch.double), 0
        for rows in DataLoader(self.eval_dataset, batch_size=self.args.eval_batch_size, collate_fn=list):
            inputs = self._prepared(rows)
            count = int(inputs["completion_mask"].sum())
            losses = [self.compute_loss(model, inputs), self._cross_entropy(inputs)]
            with self._teaching():
                losses.append(self._cross_entropy(inputs))
            totals += torch.tensor([loss.item() for loss in losses], dtype=torch.double) * count
            num_tokens += count
        self._metrics["eval"].clear()
        model.train(was_training)
        divergence, student, teacher = (totals / num_tokens).tolist()
        self.heldout_metrics = {"student_loss": student, "teacher_loss": teacher, "num_tokens": num_tokens}
        return divergence

    def _prepared(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Questions, padded on the left, and the data's answers to them, on the right."""
        inputs = {}
        for name, column, side in (("prompt", "prompt", "left"), ("completion", "completion_ids", "right")):
            ids = [torch.tensor(row[column]) for row in rows]
            inputs[f"{name}_ids"] = pad(ids, padding_value=self._tokenizer.pad_token_id, padding_side=side)
            inputs[f"{name}_mask"] = pad([torch.ones_like(one) for one in ids], padding_value=0, padding_side=side)
        return {name: tensor.to(self.accelerator.device) for name, tensor in inputs.items()}

    def _cross_entropy(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Of the answers' tokens under the active adapter, their mean."""
        input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        logits = self.model_wrapped(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        num_answered = inputs["completion_ids"].shape[1]
        targets = inputs["completion_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        answers = logits[:, -num_answered - 1 : -1].flatten(0, 1).float()
        return nn.functional.cross_entropy(answers, targets.flatten())


class _ResidentTeacher(nn.Module):
    """What TRL asks of a teacher, without weights of its own."""

    def __init__(self, model: PeftModel):
        super().__init__()
        self._models = (model,)  # no child, so that nothing takes its parameters for the teacher's

    @property
    def config(self) -> PretrainedConfig:
        return self._models[0].config

    def get_output_embeddings(self) -> nn.Module:
        return self._models[0].get_output_embeddings()
