#!/bin/sh
# The model owner's SuperLink: reachable from this machine alone, TLS and node authentication on.
# Variables: OT_FEDERATED_KEYS (ca.crt, server.crt, server.key), OT_FEDERATED_STATE (its database), OT_FEDERATED_PORT.
set -eu
keys="${OT_FEDERATED_KEYS:-/etc/ot-federated/keys}"
# The packages are installed: a run must not fetch others.
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
exec flower-superlink \
    --host 127.0.0.1 --port "${OT_FEDERATED_PORT:-9093}" \
    --ssl-ca-certfile "$keys/ca.crt" --ssl-certfile "$keys/server.crt" --ssl-keyfile "$keys/server.key" \
    --enable-supernode-auth \
    --database "${OT_FEDERATED_STATE:-/var/lib/ot-federated}/superlink.db" \
    "$@"
