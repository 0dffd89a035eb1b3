"""The tensors of a folder, read one at a time."""

import hashlib

import torch
from safetensors import SafetensorError, safe_open

from .headers import TensorHeaders


class TensorFiles(TensorHeaders):
    """[`TensorHeaders`] with values behind them."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor, mapped from its file and not copied.

        Raises:
            ValueError: the file is damaged.
        """
        path = self.files[name]
        try:
            with safe_open(path, "pt") as reader:
                return reader.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}): copy or download it again.") from error


def hash_tensor(tensor: torch.Tensor) -> str:
    """A short name of the bytes of a tensor."""
    values = tensor.detach().contiguous().cpu().flatten().view(torch.uint8)
    return hashlib.sha256(values.numpy().data).hexdigest()[:16]
