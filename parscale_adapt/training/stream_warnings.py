"""What is said while a run goes on: the aggregator leans on one stream alone, or swings between them."""

from collections.abc import Sequence


# Of the way from equal weights to the most that smoothing leaves to one stream. Beyond it the others together keep a
# tenth of what they could lose; runs that lean on one stream and still gain by mixing were seen at 0.7.
COLLAPSE_SHARE = 0.9
# One batch may suit one stream; three logs in a row are no accident.
COLLAPSE_LOGS = 3
# The swing that this was made for went from 0.46 to 0.84 to 0.19 from log to log, at a learning rate of 1e-2; at 3e-4,
# on another backbone, mean weights took 50 steps to move by 0.16 (P=2) and 0.46 (P=4).
SWING = 0.3
_ADVICE = "lower the aggregator's learning rate (`--aggregator_learning_rate`)"


class StreamWatch:
    """Sees the mean weights of the streams in each log of a run, and tells once of each kind of trouble.

    Args:
        num_streams: `P`, also an attribute.
        smoothing: `eps` of the aggregator, whose largest weight is `1 - eps + eps / P`.
    """

    def __init__(self, num_streams: int, smoothing: float):
        self.num_streams = num_streams
        equal, most = 1 / num_streams, 1 - smoothing + smoothing / num_streams
        self._threshold = equal + COLLAPSE_SHARE * (most - equal)
        self._step = 0
        self._weights: tuple[float, ...] = ()
        self._leaning_on: int | None = None
        self._num_leaning = 0
        self._told: set[str] = set()

    def see(self, step: int, weights: Sequence[float]) -> list[str]:
        """Take the mean weights `[P]` of a log into account; returns what is to be said of them."""
        troubles = {}
        if self._weights and max(abs(now - before) for now, before in zip(weights, self._weights)) > SWING:
            troubles["swing"] = (
                f"The aggregator swings: the streams' mean weights went from {_listed(self._weights)} at step "
                f"{self._step} to {_listed(weights)} at step {step}; {_ADVICE}."
            )
        largest = max(weights)
        leaning_on = weights.index(largest) if largest > self._threshold else None
        self._num_leaning = self._num_leaning + 1 if leaning_on == self._leaning_on else 1
        if leaning_on is not None and self._num_leaning >= COLLAPSE_LOGS:
            troubles["collapse"] = (
                f"The aggregator has collapsed on stream {leaning_on}: for {COLLAPSE_LOGS} logs, up to step {step} with "
                f"mean weights {_listed(weights)}, it had more than {self._threshold:.2f}, so that the others are computed "
                f"for little; {_ADVICE}, or raise `--aggregator_smoothing` in a new run."
            )
        self._step, self._weights, self._leaning_on = step, tuple(weights), leaning_on
        told = [message for kind, message in troubles.items() if kind not in self._told]
        self._told.update(troubles)
        return told


def _listed(weights: Sequence[float]) -> str:
    return " / ".join(f"{weight:.2f}" for weight in weights)
