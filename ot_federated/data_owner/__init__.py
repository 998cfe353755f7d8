"""What only a client runs: the side that holds the data."""
