"""What a SuperNode tells its data owner of the connection to the model owner, where Flower's own words say too little.

Flower's SuperNode whose clock is wrong ends as if it had been asked to; one whose key is not registered, or that was
killed a moment ago, says that it could not be activated. So the connection is looked at before Flower's SuperNode
starts, and a word follows where it ends with an error. Neither keeps it from starting: the model owner may come later.
"""

from __future__ import annotations

from pathlib import Path

from ot_federated.data_owner.doctor import check_door
from ot_federated.errors import OtFederatedError
from ot_federated.health import Finding
from ot_federated.logs import logger

not_taken = (
    "The SuperNode ended with an error; Flower's lines above tell which. With code 2004 the SuperLink did not take "
    "this node: its key is not registered there (give NAME.pub to the model owner), or the node was killed less than a "
    "minute ago and still counts as online (start it again in a minute; systemd and Docker do so). With code 2001 it "
    "has no key, or one that was made for this start alone: --auth-supernode-private-key. For all else: ot-federated "
    "doctor data-owner."
)


def look_at_connection(superlink: str, authority: Path | None) -> list[Finding]:
    """Call the model owner once and log what is not well; nothing where there is no TLS to look at.

    Args:
        superlink: ``HOST:PORT``.
        authority: Certificate of the model owner's authority; None where the system's own are used, or no TLS.

    Returns:
        What is not well.
    """
    if not superlink or authority is None:
        return []
    try:
        findings = [finding for finding in check_door(superlink, authority) if finding.level != "ok"]
    except OtFederatedError as error:
        findings = [Finding(check="model owner", level="error", found=str(error))]
    for finding in findings:
        logger.warning("%s: %s. %s", finding.check, finding.found, finding.remedy)
    return findings
