#!/bin/sh
# Register SuperNodes by name: register.sh hospital-a.pub hospital-b.pub ... The file's name is the node's name.
# The connection is the one called "owner" in Flower's configuration; OT_FEDERATED_CONNECTION names another.
set -eu
[ $# -gt 0 ] || { echo "usage: $0 NAME.pub ..." >&2; exit 2; }
for key in "$@"; do
    name="$(basename "$key" .pub)"
    flwr supernode register "$key" "${OT_FEDERATED_CONNECTION:-owner}" --name "$name"
done
