"""One command that scores a backbone and its adapters on the same items; names are imported on first use."""

from ..deferred import lazy_names


_MODULES = {
    "EvaluationSettings": "settings",
    "evaluate": "evaluating",
    "read_settings": "settings",
    "show_report": "report",
}

__all__ = [*_MODULES]
__getattr__, __dir__ = lazy_names(__name__, _MODULES)
