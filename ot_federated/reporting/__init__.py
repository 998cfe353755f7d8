"""What a run leaves behind: its directory, tables, plots and cards."""
