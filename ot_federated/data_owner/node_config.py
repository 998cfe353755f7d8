"""Limits that a data owner sets in its SuperNode's node config."""

from __future__ import annotations

from collections.abc import Mapping

from ot_federated.errors import ConfigError

default_message_bytes = 2 * 2**30


def message_limit(node_config: Mapping[str, object]) -> int:
    """Return the node config's ``max-message-bytes``, or the default.

    Raises:
        ConfigError: If it is no size.
    """
    limit = node_config.get("max-message-bytes", default_message_bytes)
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ConfigError(f"The node config's max-message-bytes={limit!r} is no number of bytes.")
    return limit
