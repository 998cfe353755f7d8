"""What only the server runs: the side that holds the full model."""
