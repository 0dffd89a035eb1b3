"""TRL's SFTTrainer with what parallel streams add."""

import torch
from torch.utils.data import DataLoader
from trl import SFTTrainer

from .diversity import diversity_term, final_stream_states
from .heldout import plain_cross_entropy
from .stream_statistics import runs_in_streams
from .stream_training import StreamTraining


class StreamTrainer(StreamTraining, SFTTrainer):
    """[`trl.SFTTrainer`] for a model with ParScale streams; the arguments are the same.

    With a [`StreamConfig`] as `args`, the loss has a diversity term: its mean over the micro-batches and processes of a
    step, whatever the number of their tokens. All else as in [`StreamTraining`].

    Raises:
        ValueError: a learning rate or the diversity term can't have an effect, or the engine is one that can't train
            this model.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._diversity_weight = getattr(self.args, "diversity_weight", 0.0)
        if self._diversity_weight and not runs_in_streams(self.model):
            raise ValueError(
                f"`diversity_weight` is {self._diversity_weight}, but only one stream runs in this model, which has no other "
                "to differ from: leave it out."
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss, in training with the diversity term, which the log tells as `stream_decorrelation`.

        In evaluation it is the plain cross-entropy of the next token, in nats, whatever is minimized.
        """
        if not self.model.training:  # DeepSpeed's engine keeps `training` set in evaluation
            with plain_cross_entropy(self):
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self._diversity_weight:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with final_stream_states(model) as states:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            term = diversity_term(states, inputs)
        mean = self.accelerator.gather(term.detach()).mean().item()
        self._metrics["train"]["stream_decorrelation"].append(mean)
        # As TRL adds the balancing loss of experts: where the loss counts tokens, nothing divides it by the micro-batches.
        num_steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
        weighted = self._diversity_weight * term / num_steps
        return (result[0] + weighted, *result[1:]) if return_outputs else result + weighted

    @torch.no_grad()
    def heldout_loss(self) -> float:
        """Mean cross-entropy per target token over the evaluation rows, in nats, however the model was trained.

        Every rank must call it, and sees all rows.

        Raises:
            ValueError: no row has a target.
        """
        model = self.model_wrapped
        was_training = model.training
        model.eval()
        rows = self._remove_unused_columns(self.eval_dataset, "evaluation")
        total, num_targets = 0.0, 0
        for batch in DataLoader(rows, batch_size=self.args.eval_batch_size, collate_fn=self.data_collator):
            inputs = self._prepare_inputs(batch)
            count = int((inputs["labels"][:, 1:] != -100).sum())
            loss = self.compute_loss(model, inputs, num_items_in_batch=torch.tensor(count))
            # Trainer scales what it averages over the ranks.
            scale = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            total += loss.item() / scale * count
            num_targets += count
        self._metrics["eval"].clear()
        model.train(was_training)
        if num_targets == 0:
            raise ValueError(f"None of {len(rows):,} held-out rows has a token to predict: give rows that have one.")
        return total / num_targets
