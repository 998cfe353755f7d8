#!/bin/sh
# A data owner's SuperNode, running approved code only.
# Variables: OT_FEDERATED_SUPERLINK (HOST:PORT of the model owner), OT_FEDERATED_ETC (ca.crt, node.key, node.toml,
# approved.json), OT_FEDERATED_NODE_PORT (of the SuperNode's own use on this machine).
set -eu
etc="${OT_FEDERATED_ETC:-/etc/ot-federated}"
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
exec ot-federated supernode --approved "$etc/approved.json" \
    --superlink "${OT_FEDERATED_SUPERLINK:?HOST:PORT of the model owner}" \
    --root-certificates "$etc/ca.crt" \
    --auth-supernode-private-key "$etc/node.key" \
    --host 127.0.0.1 --port "${OT_FEDERATED_NODE_PORT:-9094}" \
    --node-config "$etc/node.toml" \
    "$@"
