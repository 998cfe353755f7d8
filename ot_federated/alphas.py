"""The factors by which an aggregated update may be scaled, as the run config writes them."""

from __future__ import annotations

from ot_federated.errors import ConfigError

largest_alpha = 1.5


def parse_alphas(text: str) -> tuple[float, ...]:
    """Return the alphas of ``0,0.5,1,1.5`` in ascending order; none for an empty text.

    Raises:
        ConfigError: If one is no number in [0, 1.5].
    """
    alphas = set()
    for part in filter(None, map(str.strip, text.split(","))):
        try:
            alpha = float(part)
        except ValueError:
            alpha = -1.0
        if not 0 <= alpha <= largest_alpha:
            raise ConfigError(
                f"evaluation.alphas={text!r} has {part!r}: it must be numbers from 0 to {largest_alpha:g} with commas "
                "between them, as in 0.5,0.75,1,1.25,1.5, or empty."
            )
        alphas.add(alpha)
    return tuple(sorted(alphas))
