"""TRL's SFTTrainer with what parallel streams add: their statistics in the log, whole and verified checkpoints, checked
resumes.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.data import DataLoader
from transformers.trainer_utils import TrainOutput

from ..tuner.model import ParScaleModel
from ..tuner.near_identity import NearIdentity
from .diversity import diversity_term, final_stream_states
from .failures import TrainingStopped
from .finiteness import FiniteCheck, on_one_mesh
from .heldout import plain_cross_entropy
from .hub import asking_the_hub
from .learning_rates import RATE_OPTIONS, LearningRatesCallback, given_rates, refuse_idle_rates, set_rates
from .resuming import UNFOLDED_FILE, ResumingTrainer, has_unfolded_prefixes
from .run_folder import drop_old_checkpoints, verified_checkpoints
from .saving import naming_what_was_not_written, verified_save, whole_state
from .stream_statistics import StreamStatisticsCallback, runs_in_streams
from .termination import TerminationCallback


class StreamTrainer(ResumingTrainer):
    """[`trl.SFTTrainer`] for a model with ParScale streams; the arguments are the same.

    While several streams are trained, the log has what [`StreamStatisticsCallback`] says of them. With a
    [`StreamConfig`] as `args`, parts of the model have learning rates of their own, which the log tells, and the loss a
    diversity term: its mean over the micro-batches and processes of a step, whatever the number of their tokens.

    Raises:
        ValueError: a learning rate or the diversity term can't have an effect, or the engine is one that can't train
            this model.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.has_begun = False
        self._termination = TerminationCallback(self)
        self.add_callback(self._termination)
        self._own_rates = given_rates(*(getattr(self.args, name, None) for name in RATE_OPTIONS))
        self._check_rates()
        self._diversity_weight = getattr(self.args, "diversity_weight", 0.0)
        if self._diversity_weight and not runs_in_streams(self.model):
            raise ValueError(
                f"`diversity_weight` is {self._diversity_weight}, but only one stream runs in this model, which has no other "
                "to differ from: leave it out."
            )
        self._finite = FiniteCheck(self.accelerator)
        # It would hide what stops the run, and waits for the loss of each batch.
        self.args.logging_nan_inf_filter = False
        self._check_engine()
        if getattr(self.model, "is_quantized", False) or getattr(self.model, "is_loaded_in_4bit", False):
            train_in_float32(self.model)
        if runs_in_streams(self.model):
            StreamStatisticsCallback.add_to(self)
        if self._own_rates:
            LearningRatesCallback.add_to(self)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as TRL does, with the number of tokens as transformers counts them, where it does."""
        if self.args.include_num_input_tokens_seen != "no":
            # TRL counts the tokens of one row per batch where no attention mask is given.
            mode = "train" if self.model.training else "eval"
            self._metrics[mode]["num_tokens"] = [float(self.state.num_input_tokens_seen)]
        super().log(logs, start_time)

    def train(self, *args, **kwargs) -> TrainOutput:
        """Train as [`ResumingTrainer`] does.

        Raises:
            ValueError: there is no such checkpoint, or it can't be resumed.
            Terminated: SIGTERM came, and a checkpoint was saved.
            SaveFailed: a checkpoint could not be written.
        """
        with self._termination.listening():
            return super().train(*args, **kwargs)

    def near_identity_start(self) -> NearIdentity | None:
        """What was measured where the streams in training started by `init_weights="near_identity"`."""
        tuner = getattr(self.accelerator.unwrap_model(self.model), "base_model", None)
        return tuner.near_identity_of.get(self.adapter_name) if isinstance(tuner, ParScaleModel) else None

    def _get_dataloader(self, *args, **kwargs) -> DataLoader:
        loader = super()._get_dataloader(*args, **kwargs)
        self._termination.protect_workers(loader)
        return loader

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """Create it as transformers does; with rates of their own, every part of the model gets its groups."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new and self._own_rates:
            set_rates(optimizer, args[0] if args else kwargs.get("model") or self.model, self._own_rates)
        return optimizer

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

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        """One step as TRL does it; from the first one on, something has been trained that can be lost."""
        self.has_begun = True
        loss = super().training_step(*args, **kwargs)
        self._finite.add(loss)
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor | float | None:
        """Clip as transformers does, but look at the gradients before: a norm that is no number would spoil all of them."""
        if self._engine_clips(model):
            return super()._clip_grad_norm(model)
        norm = self._finite_norm(model)
        clip_grads_with_norm_(model.parameters(), self.args.max_grad_norm, norm)
        return norm

    def _get_grad_norm(
        self, model: nn.Module, grad_norm: torch.Tensor | float | None = None
    ) -> torch.Tensor | float | None:
        if self._engine_clips(model):
            grad_norm = super()._get_grad_norm(model, grad_norm)
            self._finite.check(self.state.global_step + 1, model, grad_norm)
            return grad_norm
        return self._finite_norm(model) if grad_norm is None else grad_norm

    def _engine_clips(self, model: nn.Module) -> bool:
        return self.is_deepspeed_enabled or not on_one_mesh(model)

    def _finite_norm(self, model: nn.Module) -> torch.Tensor:
        self.accelerator.unscale_gradients()
        norm = get_total_norm([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
        self._finite.check(self.state.global_step + 1, model, norm)
        return norm

    def stopped_by(self, error: Exception) -> TrainingStopped:
        """What to say of an error that stops training, with the checkpoint from which it goes on."""
        complete = verified_checkpoints(self.args.output_dir)
        return TrainingStopped(self.state.global_step, error, str(complete[-1]) if complete else None)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Evaluate as TRL does; the random numbers of training go on as if it had not happened."""
        with torch.random.fork_rng(devices=[]):  # data loaders draw a seed on the CPU, also where nothing is shuffled
            return super().evaluate(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter whole, however the engine shards it; every rank must call it."""
        model = self.accelerator.unwrap_model(self.model)
        self._save(output_dir, state_dict=whole_state(model, self.adapter_name, keep=self.args.should_save))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def init_hf_repo(self, *args, **kwargs) -> None:
        """Make the repository as transformers does, before anything is trained."""
        with asking_the_hub(self.args):
            super().init_hf_repo(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: None) -> None:
        """Save as transformers does, but older checkpoints go only once this one was read back and compared."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        unwrapped = self.accelerator.unwrap_model(self.model)
        writes, barrier = self.args.should_save, self.accelerator.wait_for_everyone
        with (
            naming_what_was_not_written(folder),
            verified_save(unwrapped, folder, self.adapter_name, writes, barrier),
            self._keeping_all_checkpoints(),
        ):
            self._save_unfolded(unwrapped, folder)
            super()._save_checkpoint(model, trial)
        if writes and self.args.save_total_limit:
            drop_old_checkpoints(folder, self.args.save_total_limit, self.state.best_model_checkpoint)

    @contextmanager
    def _keeping_all_checkpoints(self) -> Iterator[None]:
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit = limit

    def _save_unfolded(self, model: nn.Module, folder: Path) -> None:
        """Keep reparameterized prefixes, which the adapter file has folded, as they are trained."""
        if not has_unfolded_prefixes(model):
            return
        state = whole_state(model, self.adapter_name, keep=self.args.should_save)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(state, folder / UNFOLDED_FILE)

    def _check_rates(self) -> None:
        """Refuse rates of their own that nothing would use.

        Raises:
            ValueError: the part isn't trained, or the optimizer is made elsewhere.
        """
        refuse_idle_rates(self.model, self._own_rates)
        if not self._own_rates:
            return
        options = ", ".join(f"`{part}_learning_rate`" for part in self._own_rates)
        if self.optimizer is not None:
            raise ValueError(
                f"{options} would not reach the optimizer that was given as `optimizers`: make it with `parameter_groups`."
            )
        plugin = self.accelerator.state.deepspeed_plugin
        config = {} if plugin is None else plugin.deepspeed_config
        for name in ("optimizer", "scheduler"):
            if name in config:
                raise ValueError(
                    f"{options} would not reach DeepSpeed's own {name}: leave `{name}` out of the DeepSpeed configuration."
                )

    def _check_engine(self) -> None:
        """Refuse an engine that was asked for and is not used, or that can't shard what is trained.

        Raises:
            ValueError: FSDP has no effect, or parameters of several types are trained under a sharding engine.
        """
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and not self.is_fsdp_enabled:
            raise ValueError(
                "FSDP has no effect on CPUs, where accelerate runs plain DDP: use accelerate_configs/ddp.yaml."
            )
        dtypes = sorted({str(parameter.dtype) for parameter in self.model.parameters() if parameter.requires_grad})
        if self.is_fsdp_enabled and self.accelerator.mixed_precision == "no" and len(dtypes) > 1:
            raise ValueError(
                f"FSDP2 can't shard trained parameters of several types ({', '.join(dtypes)}) together: use `--bf16 true`, "
                "which keeps all of them in float32 and computes in bfloat16, or `--dtype float32`."
            )

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


def train_in_float32(model: nn.Module) -> None:
    """Undo TRL's cast of trained parameters to bfloat16 over a quantized backbone, in which small steps get lost."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
