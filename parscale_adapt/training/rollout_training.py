"""What TRL's trainers that sample answers as they train need beside it: an order of questions and answers in use that a
run finds again when it goes on, and parameters that are whole while they generate.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import Sampler
from trl.trainer.utils import RepeatSampler

from .resuming import ExpectedState
from .stream_training import StreamTraining


_STEP = "step"


class RolloutTraining(StreamTraining):
    """Stands before one of TRL's trainers that sample answers, as in `class StreamGRPOTrainer(RolloutTraining, GRPOTrainer)`."""

    def _get_train_sampler(self, *args, **kwargs) -> Sampler:
        """TRL's, but the order of an epoch does not depend on the epochs that this process has seen.

        Raises:
            ValueError: there are fewer questions than are answered at a time. TRL leaves out those that fill no batch of
                answers, so that nothing would be trained.
        """
        sampler = super()._get_train_sampler(*args, **kwargs)
        if len(sampler) == 0:
            raise ValueError(
                f"The training data has {sampler.num_samples:,} questions, and {sampler.batch_size:,} are answered at a time, "
                "so that nothing would be trained: give more questions, or a smaller --per_device_train_batch_size or "
                "--gradient_accumulation_steps."
            )
        return _SamplerByEpoch(sampler)

    def _generate_single_turn(self, *args, **kwargs) -> Any:
        """Sample as TRL does, with parameters that FSDP2 gathers first, and in the types that they are trained in."""
        with _gathered(self.model_wrapped, self.accelerator), _kept_types(self.args):
            return super()._generate_single_turn(*args, **kwargs)

    @property
    def own_states(self) -> list[ExpectedState]:
        """The answers in use, of each rank."""
        return [ExpectedState("the answers in use", _answers_file(rank)) for rank in range(self.args.world_size)]

    def _save_own_states(self, folder: Path) -> None:
        """Keep what was sampled and will be trained on after this checkpoint, and the place in it."""
        super()._save_own_states(folder)
        folder.mkdir(parents=True, exist_ok=True)
        is_open = self._step % self._batches_per_sampling != 0
        state = {_STEP: torch.tensor(self._step)}
        for number, batch in enumerate((self._buffered_inputs or ()) if is_open else ()):
            state |= {f"{number}.{name}": tensor.clone() for name, tensor in batch.items()}
        save_file(state, folder / _answers_file(self.args.process_index))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and not self.restarts_optimizer:
            path = Path(checkpoint) / _answers_file(self.args.process_index)
            state = load_file(path)
            self._step = int(state.pop(_STEP))
            batches: dict[int, dict[str, torch.Tensor]] = defaultdict(dict)
            for key, tensor in state.items():
                number, _, name = key.partition(".")
                batches[int(number)][name] = tensor.to(self.accelerator.device)
            self._buffered_inputs = [batches[number] for number in sorted(batches)] or None

    @property
    def _batches_per_sampling(self) -> int:
        """Batches that are trained on between two times that TRL samples."""
        return self.args.gradient_accumulation_steps


def _answers_file(rank: int) -> str:
    return f"answers_{rank}.safetensors"


class _SamplerByEpoch(Sampler[int]):
    """TRL's sampler draws one epoch after the other from one generator, so that a resumed run would repeat the first."""

    def __init__(self, sampler: RepeatSampler):
        self._sampler, self._epoch = sampler, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self._sampler.shuffle:
            self._sampler.generator.manual_seed(self._sampler.seed + self._epoch)
        return iter(self._sampler)

    def __len__(self) -> int:
        return len(self._sampler)


@contextmanager
def _gathered(model: nn.Module, accelerator: Any) -> Iterator[None]:
    """Gather all of what FSDP2 shards, and keep it: `generate` passes by the root's hooks, and ranks differ in the number
    of their tokens, so that gathering for each of them would wait for ever.
    """
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not modules:
        yield
        return
    model.set_reshard_after_forward(False)
    for module in modules:
        module.unshard()
    try:
        yield
    finally:
        model.set_reshard_after_forward(bool(accelerator.state.fsdp_plugin.reshard_after_forward))
        for module in modules:
            module.reshard()


@contextmanager
def _kept_types(args: Any) -> Iterator[None]:
    """TRL casts the whole model for continuous batching, for good: small steps of what is trained would be lost."""
    precision = args.bf16, args.fp16
    args.bf16 = args.fp16 = False
    try:
        yield
    finally:
        args.bf16, args.fp16 = precision
