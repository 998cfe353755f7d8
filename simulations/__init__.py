"""Running a whole federation on one machine: launcher, in-process grid, scenarios."""
