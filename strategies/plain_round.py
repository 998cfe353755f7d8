"""A round whose updates the server sees one by one: each client gets the bundle if it lacks it, trains, and replies."""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import Message
from flwr.serverapp import Grid

from ot_federated.logs import log_fields
from strategies.conversation import Conversation, hold_conversations
from strategies.participants import Participants
from strategies.replies import RoundRecord, describe_reply


def hold_plain_round(
    grid: Grid,
    messages: Iterable[Message],
    *,
    participants: Participants,
    record: RoundRecord,
    num_needed: int,
    straggler_seconds: float,
    timeout_seconds: float,
    quiet: bool = False,
) -> list[Message]:
    """Let every chosen client train, and return the replies in the order of the messages.

    Args:
        grid: Flower's grid.
        messages: The message ``train`` to each chosen client.
        participants: The run's clients; those that failed are forgotten.
        record: The round's record; gets the failures and the bytes of the bundle.
        num_needed: Replies that would do.
        straggler_seconds: Longest wait for the others once these are there; 0 for no such limit.
        timeout_seconds: For the whole round.
        quiet: Say nothing of what clients tell of their data.
    """
    conversations = participants.open_conversations(messages)
    names = {conversation.node_id: participants.name(conversation.node_id) for conversation in conversations}
    num_done = 0

    def report(conversation: Conversation) -> None:
        nonlocal num_done
        num_done += 1
        head = f"round {record.number}  {num_done}/{len(conversations)}  {names[conversation.node_id]}"
        with log_fields(node=names[conversation.node_id]):
            participants.on_progress(f"{head}  {describe_reply(conversation, quiet=quiet)}")

    hold_conversations(
        grid,
        conversations,
        timeout_seconds=timeout_seconds,
        on_change=report,
        num_enough=num_needed,
        straggler_seconds=straggler_seconds,
    )
    for conversation in conversations:
        node_id, name = conversation.node_id, names[conversation.node_id]
        record.bundle_bytes += conversation.num_bundle_bytes
        if not conversation.failure:
            participants.note_bundle(node_id, conversation.hello)
            continue
        participants.forget(node_id)
        if conversation.rejected:
            participants.reject(node_id, name, conversation.failure, record=record)
        else:
            record.failures[name] = conversation.failure
    return [conversation.reply for conversation in conversations if conversation.reply is not None]
