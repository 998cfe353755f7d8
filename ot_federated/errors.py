"""Errors a person can act on.

Every message names the bad value and the remedy. These are the only exceptions whose text a client puts into
a reply: their messages never quote private data.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OtFederatedError(Exception):
    """Base of the errors that this project raises for its users.

    Attributes:
        may_leave: Whether a client may put the text into a reply; not where it names places on its own disk.
    """

    may_leave = True


class ConfigError(OtFederatedError):
    """A setting is unknown, of the wrong type, out of range, or does not fit the model."""


class SourceError(OtFederatedError):
    """A model, a data set or a package could not be found, fetched, verified or read."""


class DataError(OtFederatedError):
    """A data set was read, but its columns or values are not what the task needs."""


class ArchitectureError(OtFederatedError):
    """A model's family is not in the architecture table, or its layout contradicts the table."""


class BundleError(OtFederatedError):
    """A bundle on disk or on the wire is incomplete, altered, or of another version."""


class PlugInError(OtFederatedError):
    """An adapter does not fit the model that it should be plugged into."""


class ProtocolError(OtFederatedError):
    """A peer sent a message that the protocol does not allow."""


class RefusalError(ProtocolError):
    """A peer refused or broke down, and said so as the protocol wants: it has done nothing wrong."""


class CheckpointError(OtFederatedError):
    """A checkpoint is damaged or belongs to another configuration."""


def nearest_match(value: str, allowed: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the allowed name closest to ``value``, or an empty string."""
    names = list(allowed)
    # No name that is shorter than a third is close: a stranger's long key costs no time.
    if len(value) > 3 * max(map(len, names), default=0):
        return ""
    matcher = difflib.SequenceMatcher()
    matcher.set_seq2(value)
    # The ratio itself is slow; the quick one is never below it. So a few names are compared in full, where
    # difflib.get_close_matches compares all that could pass its cutoff.
    quick_ratios = []
    for name in names:
        matcher.set_seq1(name)
        if matcher.real_quick_ratio() >= 0.5:
            quick_ratios.append((matcher.quick_ratio(), name))
    best, best_ratio = "", 0.0
    for quick_ratio, name in sorted(quick_ratios, reverse=True):
        if quick_ratio < 0.5 or quick_ratio <= best_ratio:
            break
        matcher.set_seq1(name)
        if (ratio := matcher.ratio()) >= 0.5 and ratio > best_ratio:
            best, best_ratio = name, ratio
    return f" (did you mean {best!r}?)" if best else ""
