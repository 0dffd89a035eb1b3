"""The backbone's files and its tokenizer, looked at before any weight loads."""

from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils.import_utils import is_bitsandbytes_available

from ..checkpoints.belonging import check_belonging
from ..checkpoints.folders import find_adapter
from ..checkpoints.whole import check_adapter_folder, check_backbone_folder
from ..data import TokenizerSettings, check_vocabulary, load_tokenizer
from ..tuner.config import ParScaleConfig
from .arguments import BackboneArguments
from .stream_config import RecipeConfig


def load_backbone_tokenizer(path: str, backbone: BackboneArguments, training: RecipeConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a backbone, as `eos_token`, `pad_token` and `chat_template_path` ask for it.

    Args:
        path: folder or hub name of the backbone.
        backbone: what else is loaded.
        training: TRL's arguments; `chat_template_path` is done with and taken out of them.

    Raises:
        ValueError: a file of the backbone or the adapter is damaged, an adapter was trained on another backbone, a package
            is missing, or the tokenizer lacks something or does not fit the embedding.
    """
    if backbone.load_in_4bit and not is_bitsandbytes_available():
        raise ValueError(
            "`load_in_4bit` needs the package bitsandbytes, which isn't installed: run "
            "`pip install 'parscale_adapt[quantization]'`."
        )
    for folder, check in ((path, check_backbone_folder), (backbone.adapter_name_or_path, check_adapter_folder)):
        if folder is not None and Path(folder).expanduser().is_dir():
            check(Path(folder).expanduser())
    settings = TokenizerSettings(
        backbone.model_revision,
        getattr(training, "eos_token", None),  # DPO knows none
        getattr(training, "pad_token", None),  # nor does GRPO
        getattr(training, "chat_template_path", None),
        training.trust_remote_code,
    )
    tokenizer = load_tokenizer(path, settings)
    if hasattr(training, "chat_template_path"):
        training.chat_template_path = None  # TRL would resize the embedding for it
    config = AutoConfig.from_pretrained(
        path, revision=backbone.model_revision, trust_remote_code=training.trust_remote_code
    )
    check_vocabulary(tokenizer, config.get_text_config().vocab_size, path)
    _check_adapters(path, backbone, training, config)
    return tokenizer


def _check_adapters(path: str, backbone: BackboneArguments, training: RecipeConfig, config: PreTrainedConfig) -> None:
    """Those that lie on the disk, as the backbone does; what the hub has is compared when it loads."""
    own = backbone.adapter_name_or_path if backbone.verify_backbone else None
    for name in (own, getattr(training, "teacher_model_name_or_path", None)):
        if name is not None and Path(name).expanduser().is_dir() and Path(path).expanduser().is_dir():
            adapter = find_adapter(str(Path(name).expanduser())).folder
            check_belonging(adapter, ParScaleConfig.from_pretrained(str(adapter)), Path(path).expanduser(), config)
