"""The data owner's side of secure aggregation: its update leaves masked, or not at all.

Flower's SecAgg+ client does the cryptography. Around it stand checks of what the server asks for: too few shares, or
both shares of one client, would undo the masks.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.compat.common.recorddict_compat import fitres_to_recorddict

from ot_federated.errors import ProtocolError
from ot_federated.messages import config_key, wire_version
from ot_federated.secure_masks import strengthen

min_shares = 3
# By its full name: the package has a function of the same name in the module's place.
flower_client: Any = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")
strengthen(flower_client)


def answer_securely(message: Message, context: Context, train: Callable[[], list[np.ndarray]]) -> RecordDict:
    """Answer one step of the protocol.

    Args:
        message: The step.
        context: Flower's context, which keeps this client's keys between the steps.
        train: Makes the update: fp32 arrays in a fixed order. Called in one step only.

    Raises:
        ProtocolError: If the server asks for what would undo the masks, or the step is malformed.
    """
    asked = message.content.config_records[RECORD_KEY_CONFIGS]
    check_step(asked)

    def call_next(inner: Message, _context: Context) -> Message:
        arrays = train()
        # Every client counts the same: the number of its examples would travel in the clear, and so would that of its
        # steps, which tells it.
        result = FitRes(Status(Code.OK, ""), ndarrays_to_parameters(arrays), num_examples=1, metrics={})
        return Message(fitres_to_recorddict(result, keep_input=False), reply_to=inner)

    try:
        content: RecordDict = flower_client.secaggplus_mod(message, context, call_next).content
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"the step of secure aggregation is malformed ({type(error).__name__})") from error
    content.config_records[config_key] = ConfigRecord({"wire-version": wire_version, "status": "ok"})
    return content


def check_step(asked: ConfigRecord) -> None:
    """Check that a step keeps what the masks promise.

    Raises:
        ProtocolError: If it does not.
    """
    stage = asked.get(Key.STAGE)
    if stage == Stage.SETUP:
        sampled, shares, threshold = (
            _count(asked, key) for key in (Key.SAMPLE_NUMBER, Key.SHARE_NUMBER, Key.THRESHOLD)
        )
        if sampled < min_shares or shares < min_shares or not shares / 2 < threshold <= shares:
            raise ProtocolError(
                f"secure aggregation over {sampled} clients with {shares} shares and a threshold of {threshold} is "
                f"refused: it needs at least {min_shares} clients and shares, and a threshold above half of the shares"
            )
        weight, clipping = asked.get(Key.MAX_WEIGHT), asked.get(Key.CLIPPING_RANGE)
        if weight != 1.0 or not isinstance(clipping, float) or not 0 < clipping < float("inf"):
            raise ProtocolError(f"secure aggregation with weight {weight!r} and range {clipping!r} is refused")
        bits, modulus = _count(asked, Key.TARGET_RANGE), _count(asked, Key.MOD_RANGE)
        if modulus != 2**32 or not 2**8 <= bits <= 2**22 or bits * sampled >= modulus:
            raise ProtocolError(f"secure aggregation modulo {modulus} with {bits} levels is refused: sums would wrap")
    if stage == Stage.UNMASK:
        alive, dead = asked.get(Key.ACTIVE_NODE_ID_LIST), asked.get(Key.DEAD_NODE_ID_LIST)
        if not isinstance(alive, list) or not isinstance(dead, list) or set(alive) & set(dead):
            # Who has a client's seed and its key as well can take all of its masks off.
            raise ProtocolError("the server asks for both secrets of one client: refused, they would show its update")


def _count(asked: ConfigRecord, key: str) -> int:
    value = asked.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ProtocolError(f"secure aggregation with {key}={value!r} is refused")
    return value
