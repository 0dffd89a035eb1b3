"""What parallel streams add to any of TRL's trainers: their statistics in the log, learning rates by part, whole and
verified checkpoints, checked resumes, an end of one sentence.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.data import DataLoader
from transformers.trainer_utils import TrainOutput

from ..tuner.model import ParScaleModel
from ..tuner.near_identity import NearIdentity
from .failures import TrainingStopped
from .finiteness import FiniteCheck, on_one_mesh
from .hub import asking_the_hub
from .learning_rates import (
    RATE_OPTIONS,
    LearningRatesCallback,
    advised_rates,
    given_rates,
    refuse_idle_rates,
    set_rates,
)
from .resuming import UNFOLDED_FILE, ResumingTrainer, has_unfolded_prefixes
from .run_folder import drop_old_checkpoints, verified_checkpoints
from .run_log import RunLogCallback
from .saving import naming_what_was_not_written, verified_save, whole_state
from .stream_statistics import StreamStatisticsCallback, runs_in_streams
from .termination import TerminationCallback


class StreamTraining(ResumingTrainer):
    """Stands before a trainer of TRL, as in `class StreamTrainer(StreamTraining, SFTTrainer)`.

    While several streams are trained, the log has what [`StreamStatisticsCallback`] says of them. With
    [`StreamOptions`] in `args`, parts of the model have learning rates of their own, which the log tells. Of several
    adapters in the model the active one is saved.

    Attributes:
        loss_label: what is minimized and its unit, for pictures and cards.
        curve: the log's figure that is drawn.
        curve_label: what it is and its unit.
        loader: PEFT's class that loads what was trained.
        pipeline_tag: the hub's name of what it is for.
        heldout_metrics: what [`heldout_loss`] found beside the loss.

    Raises:
        ValueError: a learning rate can't have an effect, or the engine is one that can't train this model.
    """

    loss_label: ClassVar[str] = "loss (nats per token)"
    curve: ClassVar[str] = "loss"
    curve_label: ClassVar[str | None] = None  # None: that of the loss
    loader: ClassVar[str] = "AutoPeftModelForCausalLM"
    pipeline_tag: ClassVar[str] = "text-generation"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.has_begun = False
        self._termination = TerminationCallback(self)
        self.add_callback(self._termination)
        self._own_rates = given_rates(*(getattr(self.args, name, None) for name in RATE_OPTIONS))
        if getattr(self.args, "advises_rates", False) and self.optimizer is None:
            self._own_rates = {**advised_rates(self.model), **self._own_rates}
        self._check_rates()
        self.heldout_metrics: dict[str, float] = {}
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
        self.add_callback(RunLogCallback())

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
        # Data loaders draw a seed on the CPU, also where nothing is shuffled; answers are sampled on the GPU.
        gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=gpus):
            return super().evaluate(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter whole, however the engine shards it; every rank must call it."""
        model = self.accelerator.unwrap_model(self.model)
        state = whole_state(model, self.adapter_name, keep=self.args.should_save)
        with _only_adapter(model, self.adapter_name):
            self._save(output_dir, state_dict=state)
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
            self._save_own_states(folder)
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

    def _save_own_states(self, folder: Path) -> None:
        """Keep what transformers does not; every rank must call it. Here reparameterized prefixes as they are trained,
        which the adapter file has folded.
        """
        model = self.accelerator.unwrap_model(self.model)
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
                    f"{options} would not reach DeepSpeed's own {name}: leave `{name}` out of the DeepSpeed configuration, "
                    "or give one `learning_rate` for all parts."
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

    def heldout_loss(self) -> float | None:
        """Mean loss over the evaluation rows, which each trainer measures in its own way; every rank must call it.

        None where no loss tells how good a model is, but what `heldout_metrics` then has.
        """
        raise NotImplementedError


@contextmanager
def _only_adapter(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Let `save_pretrained`, which a trainer calls without naming adapters, save one of them inside the block."""
    save = model.save_pretrained
    model.save_pretrained = partial(save, selected_adapters=[adapter_name])
    try:
        yield
    finally:
        del model.save_pretrained


def train_in_float32(model: nn.Module) -> None:
    """Undo TRL's cast of trained parameters to bfloat16 over a quantized backbone, in which small steps get lost."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
