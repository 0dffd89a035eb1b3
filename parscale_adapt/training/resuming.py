"""Which checkpoints a run can go on from: those of the same streams, on the same backbone, with all of their states."""

import json
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from accelerate.utils import DistributedType
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import StateDictType
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from ..core.prefix import ReparameterizedPrefix
from ..hf.fingerprint import describe_difference
from ..models.standalone import STREAM_FIELDS
from ..tuner.config import ParScaleConfig
from .run_folder import SAVE_RECORD, last_verified_checkpoint


_STREAM_SETTINGS = (*STREAM_FIELDS, "init_weights", "train_backbone", "lora")
_TRAINER_STATE = "trainer_state.json"
UNFOLDED_FILE = "unfolded_state.safetensors"


class ResumingTrainer(Trainer):
    """The part of [`StreamTraining`] that goes on from checkpoints: with all of their states, or by a choice without."""

    has_begun = False

    @property
    def adapter_name(self) -> str:
        """The adapter that is trained."""
        return self.accelerator.unwrap_model(self.model).active_adapters[0]

    @property
    def restarts_optimizer(self) -> bool:
        """Whether a checkpoint's optimizer, loss scale and random numbers are left unread."""
        return getattr(self.args, "restart_optimizer", False)

    @property
    def own_states(self) -> list["ExpectedState"]:
        """Files of a checkpoint, besides transformers' own, without which training does not go on as it would have."""
        return []

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs) -> TrainOutput:
        """Train as the trainer does; a checkpoint that this run can't go on from is refused before it is read.

        Args:
            resume_from_checkpoint: a checkpoint; or True for the last one in `output_dir` whose save was verified.
            **kwargs: as in [`transformers.Trainer.train`].

        Raises:
            ValueError: there is no such checkpoint, it can't be resumed, or lacks a state; or there is none to restart.
            NonFiniteError: a loss or a gradient is not finite.
        """
        self.has_begun = False
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_verified_checkpoint(self.args.output_dir))
        if self.restarts_optimizer:
            self._prepare_restart(resume_from_checkpoint)
        if resume_from_checkpoint:
            check_resumable(self.model.peft_config[self.adapter_name], resume_from_checkpoint)
            check_step(resume_from_checkpoint)
            if not self.restarts_optimizer:
                check_states(resume_from_checkpoint, [*expected_states(self), *self.own_states])
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)

    def _prepare_restart(self, checkpoint: str | bool | None) -> None:
        """Say what starts anew.

        Raises:
            ValueError: it has no effect, or the engine keeps the weights with the optimizer.
        """
        if not checkpoint:
            raise ValueError("`restart_optimizer` has no effect without `--resume_from_checkpoint`: leave one out.")
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                "`restart_optimizer` can't go on under DeepSpeed or FSDP, which keep optimizer and weights together: start a "
                f"new run from the weights with `--adapter_name_or_path {checkpoint}` and another `--output_dir`."
            )
        self.accelerator.print(
            f"Going on from {checkpoint} at step {check_step(str(checkpoint))}: the optimizer, the loss scale and the random "
            "numbers start anew, the learning rate's schedule goes on at this step. It is not the run that it would have been."
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: PeftModel | None = None) -> None:
        """Load as transformers does; but reparameterized prefixes unfolded."""
        if self.is_fsdp_enabled or not has_unfolded_prefixes(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._load_unfolded(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        """Load the best checkpoint as transformers does; but reparameterized prefixes unfolded."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or not has_unfolded_prefixes(self.model):
            super()._load_best_model()
        else:
            self._load_unfolded(self.state.best_model_checkpoint)

    def _load_unfolded(self, checkpoint: str) -> None:
        state = load_file(Path(checkpoint) / UNFOLDED_FILE)
        self.model.load_state_dict(state, strict=False)  # all that is trained; the frozen backbone is not in it

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.restarts_optimizer:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif isinstance(self.lr_scheduler, LambdaLR):  # a function of the step; others go by what they have seen
            self.lr_scheduler.last_epoch = self.state.global_step - 1
            with warnings.catch_warnings():
                # Torch wants a step of the optimizer before the first one of the schedule.
                warnings.simplefilter("ignore")
                self.lr_scheduler.step()

    def _load_scaler(self, checkpoint: str | None) -> None:
        super()._load_scaler(None if self.restarts_optimizer else checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(None if self.restarts_optimizer else checkpoint)


@dataclass(frozen=True)
class ExpectedState:
    """Files without which training does not go on as it would have.

    Args:
        what: what is in them.
        pattern: where they lie in a checkpoint, as a glob.
        count: how many there are at least.
    """

    what: str
    pattern: str
    count: int = 1


def check_resumable(config: PeftConfig, checkpoint: str) -> None:
    """Refuse a checkpoint of other streams or of another backbone.

    Raises:
        ValueError: the number of streams, what they differ by, what is trained or the backbone differ.
    """
    stored = ParScaleConfig().to_dict() | json.loads((Path(checkpoint) / "adapter_config.json").read_text())
    current = config.to_dict()
    for name in _STREAM_SETTINGS:
        here = current[name]
        if stored[name] != here:
            raise ValueError(
                f"{checkpoint} can't be resumed: its `{name}` is {stored[name]!r}, this run's is {here!r}. Resume with "
                "the settings that it was saved with."
            )
    difference = describe_difference(stored["backbone_fingerprint"], config.backbone_fingerprint)
    if difference is not None:
        raise ValueError(f"{checkpoint} can't be resumed, since it was trained on another backbone: {difference}.")


def expected_states(trainer: Trainer) -> list[ExpectedState]:
    """What a checkpoint of this trainer under its engine holds, besides the weights and the step."""
    world_size, accelerator = trainer.args.world_size, trainer.accelerator
    schedule = ExpectedState("the learning rate's schedule", "scheduler.pt")
    random = [
        ExpectedState("the random state", f"rng_state_{rank}.pth" if world_size > 1 else "rng_state.pth")
        for rank in range(world_size)
    ]
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        plugin = accelerator.state.deepspeed_plugin
        stage, config = plugin.zero_stage, plugin.deepspeed_config
        states = [ExpectedState("DeepSpeed's model state", "global_step*/*model_states.pt")]
        if stage > 0:
            states.append(ExpectedState("the optimizer's state", "global_step*/*optim_states.pt", world_size))
        return [*states, *random] if "scheduler" in config else [*states, schedule, *random]
    if accelerator.distributed_type == DistributedType.FSDP:
        is_full = accelerator.state.fsdp_plugin.state_dict_type == StateDictType.FULL_STATE_DICT
        weights = "pytorch_model_fsdp.bin" if is_full else "pytorch_model_fsdp_0/.metadata"
        optimizer = "optimizer.bin" if is_full else "optimizer_0/.metadata"
        return [
            ExpectedState("FSDP's model state", weights),
            ExpectedState("the optimizer's state", optimizer),
            schedule,
            *random,
        ]
    scaler = [] if accelerator.scaler is None else [ExpectedState("the loss scale", "scaler.pt")]
    return [ExpectedState("the optimizer's state", "optimizer.pt"), schedule, *scaler, *random]


def check_states(checkpoint: str, expected: list[ExpectedState]) -> None:
    """Refuse a checkpoint in which a state is missing or cut, whatever engine wrote it.

    Raises:
        ValueError: one is; it is named, with its file.
    """
    problem = next(_problems(Path(checkpoint), expected), None)
    if problem is not None:
        raise ValueError(
            f"{checkpoint} can't be resumed as it was: {problem}; resume from another checkpoint, or pass "
            "`--restart_optimizer true` to go on from its weights and its step with a new optimizer."
        )


def check_step(checkpoint: str) -> int:
    """The step of a checkpoint.

    Raises:
        ValueError: the file that tells it is missing or damaged.
    """
    path = Path(checkpoint) / _TRAINER_STATE
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = "is damaged" if path.is_file() else "is missing"
        raise ValueError(
            f"{checkpoint} can't be resumed: {_TRAINER_STATE}, which tells its step, {found}; resume from another "
            "checkpoint, or start a new run from its weights with `--adapter_name_or_path`."
        ) from error


def _problems(checkpoint: Path, expected: list[ExpectedState]) -> Iterator[str]:
    for state in expected:
        found = len(list(checkpoint.glob(state.pattern)))
        if found < state.count:
            number = "no" if found == 0 else f"{found} instead of {state.count} files"
            yield f"it has {number} {state.pattern}, {state.what} (`--save_only_model` leaves all states out)"
    yield from _damages(checkpoint)


def _damages(checkpoint: Path) -> Iterator[str]:
    record = checkpoint / SAVE_RECORD
    # What was there when the save was verified; older records don't tell.
    sizes = json.loads(record.read_text()).get("files", {}) if record.is_file() else {}
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != size:
            yield f"{name} is damaged, it has {path.stat().st_size:,} bytes instead of {size:,}"
    for pattern in ("*.pt", "*.pth", "global_step*/*.pt"):
        for path in sorted(checkpoint.glob(pattern)):
            if not zipfile.is_zipfile(path):
                yield f"{path.relative_to(checkpoint)} is damaged, it has no end"


def has_unfolded_prefixes(model: nn.Module) -> bool:
    """Whether prefixes are trained through an MLP, which the adapter file has folded."""
    return any(isinstance(module, ReparameterizedPrefix) for module in model.modules())
