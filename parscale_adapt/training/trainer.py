"""TRL's SFTTrainer with what parallel streams add: their statistics in the log, verified checkpoints, checked resumes."""

import json
from pathlib import Path

import torch
from peft import PeftConfig
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import TrainOutput
from trl import SFTConfig, SFTTrainer

from ..aggregator import Aggregator
from .saving import record_verified, verify_save


class StreamTrainer(SFTTrainer):
    """[`trl.SFTTrainer`] for a model with ParScale streams; the arguments are the same."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(_VerifySaves(self))
        self._aggregators = [module for module in self.model.modules() if isinstance(module, Aggregator)]
        for aggregator in self._aggregators:
            aggregator.record_weights = True

    @property
    def adapter_name(self) -> str:
        """The adapter that is trained."""
        return self.accelerator.unwrap_model(self.model).active_adapters[0]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as TRL does, with the number of tokens seen and, while training, each stream's mean weight."""
        mode = "train" if self.model.training else "eval"
        if mode == "train":
            for aggregator in self._aggregators:
                if aggregator.last_weights is not None:
                    logs.update(stream_statistics(aggregator.last_weights))
        # TRL counts the tokens of one row per batch where no attention mask is given.
        self._metrics[mode]["num_tokens"] = [float(self.state.num_input_tokens_seen)]
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs) -> TrainOutput:
        """Train as TRL does; a checkpoint of other streams or of another backbone is refused before it is read."""
        if resume_from_checkpoint is not None:
            check_resumable(self.model.peft_config[self.adapter_name], resume_from_checkpoint)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    @torch.no_grad()
    def heldout_loss(self) -> float:
        """Mean loss per token over the evaluation rows, in nats; every rank must call it."""
        model = self.model_wrapped
        was_training = model.training
        model.eval()
        total, count = 0.0, 0
        for inputs in self.get_eval_dataloader():
            inputs = {**self._prepare_inputs(inputs), "use_cache": False}
            output = model(**inputs, fused_lm_head=True)
            losses = self.accelerator.gather_for_metrics(-output.log_probs.double().sum(dim=1))
            counts = self.accelerator.gather_for_metrics(output.label_mask.sum(dim=1))
            total += losses.sum().item()
            count += counts.sum().item()
        model.train(was_training)
        return total / count


def stream_statistics(weights: torch.Tensor) -> dict[str, float]:
    """Mean weight of each stream and mean entropy (in nats) of `[B, T, P]` aggregator weights."""
    by_token = weights.flatten(0, -2)
    entropy = -(by_token * by_token.clamp(min=1e-9).log()).sum(-1).mean()
    means = by_token.mean(0).tolist()
    return {"stream_entropy": entropy.item()} | {f"stream_weight/{p}": mean for p, mean in enumerate(means)}


def check_resumable(config: PeftConfig, checkpoint: str) -> None:
    """Refuse a checkpoint of other streams or of another backbone.

    Raises:
        ValueError: the number of streams, the prefix length, what is trained or the backbone differ.
    """
    stored = json.loads((Path(checkpoint) / "adapter_config.json").read_text())
    for name in ("num_streams", "num_prefix_tokens", "aggregator_smoothing", "train_backbone", "backbone_fingerprint"):
        here = getattr(config, name)
        if stored[name] != here:
            raise ValueError(
                f"{checkpoint} can't be resumed: its `{name}` is {stored[name]!r}, this run's is {here!r}. Resume with "
                "the settings that it was saved with."
            )


class _VerifySaves(TrainerCallback):
    """Read every checkpoint back and compare it with the live model."""

    def __init__(self, trainer: StreamTrainer):
        self.trainer = trainer

    def on_save(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        num_tensors = verify_save(model, folder, self.trainer.adapter_name, args.should_save)
        if args.should_save:
            record_verified(folder, num_tensors)
