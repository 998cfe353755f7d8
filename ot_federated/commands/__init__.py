"""The commands of ``ot-federated``, a file each."""
