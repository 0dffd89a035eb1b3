"""The recipes' command lines and YAML files: which settings were given, and which were left at their defaults."""

import argparse
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import yaml
from trl import TrlParser

from .arguments import BackboneArguments


_RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


class RecipeParser(TrlParser):
    """TRL's parser, which also notes what was given explicitly, in [`BackboneArguments.explicit_settings`].

    Every setting goes by its name with underscores or with dashes, on the command line and in a YAML file. Whatever is
    wrong with either is a ValueError of one sentence.
    """

    def __init__(self, dataclass_types: Iterable[type]):
        super().__init__(dataclass_types, allow_abbrev=False)
        self._names_in_file: set[str] = set()
        self._names_on_line: set[str] = set()

    def parse_args_and_config(self, args: Sequence[str], **kwargs: Any) -> tuple[Any, ...]:
        """As TRL's.

        Raises:
            ValueError: an unknown name, a value of the wrong type, or a file that is no YAML mapping of names to values.
        """
        try:
            parsed = super().parse_args_and_config(_with_separate_path(args), **kwargs)
        except yaml.YAMLError as error:
            raise ValueError(f"`--config` names a file that is no YAML: {error}") from error
        for arguments in parsed:
            if isinstance(arguments, BackboneArguments):
                arguments.explicit_settings = frozenset(self._names_in_file | self._names_on_line)
        return parsed

    def set_defaults_with_config(self, **settings: Any) -> list[str]:
        """Take the settings of a YAML file as TRL does; dashes are read as underscores.

        Raises:
            ValueError: a setting is given twice, with dashes and with underscores.
        """
        named: dict[str, Any] = {}
        for key, value in settings.items():
            name = key.replace("-", "_")
            if name in named:
                raise ValueError(f"`{name}` is given twice in the config file, with dashes and with underscores.")
            named[name] = value
        self._names_in_file = set(named)
        return super().set_defaults_with_config(**named)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        """Parse as argparse does; then once more without defaults, which leaves what was given."""
        parsed = super().parse_known_args(args, namespace)
        defaults = [action.default for action in self._actions]
        for action in self._actions:
            action.default = argparse.SUPPRESS
        try:
            given, _ = super().parse_known_args(args)
        finally:
            for action, default in zip(self._actions, defaults):
                action.default = default
        self._names_on_line = set(vars(given))
        _use_new_names(parsed[0])
        return parsed

    def error(self, message: str) -> NoReturn:
        """One sentence instead of argparse's page of usage."""
        raise ValueError(message)


def _use_new_names(settings: argparse.Namespace) -> None:
    """Hand settings over under the names that newer versions of transformers want, and older ones don't know."""
    for old, new in _RENAMED.items():
        if getattr(settings, new, False) is None:
            setattr(settings, new, getattr(settings, old))


def _with_separate_path(args: Sequence[str]) -> list[str]:
    """`--config=FILE` as the two words that TRL looks for."""
    words: list[str] = []
    for word in args:
        words += ["--config", word.removeprefix("--config=")] if word.startswith("--config=") else [word]
    if words and words[-1] == "--config":
        raise ValueError("`--config` needs the path of a YAML file behind it.")
    return words
