"""How every message is answered: by content or by a reason, and never without a line in the audit trail."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import Context, Message, RecordDict

from ot_federated.data_owner.audit_trail import Entry, Notes, append_entry, choose_trail, describe_content
from ot_federated.errors import OtFederatedError
from ot_federated.logs import log_fields, logger, show_lines
from ot_federated.messages import build_content, config_key


def client_name(context: Context) -> str:
    """Return this client's name: node config ``name``, ``client-<partition>`` in a simulation, else its node id."""
    if name := context.node_config.get("name"):
        return str(name)
    partition = context.node_config.get("partition-id")
    return f"client-{partition:04d}" if isinstance(partition, int) else f"node-{context.node_id}"


def reply_to(
    message: Message, context: Context, build: Callable[[], RecordDict], *, notes: Notes | None = None
) -> Message:
    """Return the reply that ``build`` makes, or the reason why there is none, once the audit trail has it.

    Args:
        message: What is answered.
        context: Flower's context of this client.
        build: Makes the reply's content.
        notes: What ``build`` notes for the audit trail.
    """
    record = message.content.config_records.get(config_key) if message.has_content() else None
    asked: Mapping[str, Any] = record or {}
    server_round = asked.get("server-round")
    about: dict[str, str | int] = {"run": str(message.metadata.run_id), "node": client_name(context)}
    if isinstance(server_round, int):
        about["round"] = server_round
    with log_fields(**about):
        content = content_or_reason(build)
        try:
            if path := choose_trail(context.node_config):
                told = content.config_records[config_key]
                entry = Entry(
                    message=message.metadata.message_type,
                    client=client_name(context),
                    flower_run=str(message.metadata.run_id),
                    run=str(asked.get("run", ""))[:200],
                    server_round=server_round if isinstance(server_round, int) else None,
                    status=str(told.get("status", "")),
                    reason=str(told.get("reason", "")),
                    content=describe_content(content),
                    guarantee=notes.guarantee if notes else None,
                )
                append_entry(path, entry)
        except (OtFederatedError, OSError) as error:
            logger.error("nothing leaves, because the audit trail cannot be written: %s", error)
            content = build_content({"status": "error", "reason": "the client cannot write its audit trail"})
        return Message(content, reply_to=message)


def content_or_reason(build: Callable[[], RecordDict]) -> RecordDict:
    """Return what ``build`` makes; in place of an exception, content that tells the reason.

    Our own errors are written for strangers to read. The text of any other could quote private data: it goes to
    this side's log, and only its type leaves.
    """
    try:
        show_lines()
        return build()
    except SystemExit:  # what Flower makes of SIGTERM
        logger.warning("stopped before there was a reply; nothing has left, and what was paid stays paid")
        raise
    except OtFederatedError as error:
        logger.warning("%s: %s", type(error).__name__, error)
        reason = str(error) if error.may_leave else f"{type(error).__name__}; the client's log has the details"
    except Exception as error:
        logger.exception("the message could not be handled")
        reason = f"{type(error).__name__}; the client's log has the details"
    return build_content({"status": "error", "reason": reason})
