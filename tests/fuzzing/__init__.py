"""Coverage-guided fuzzing of every parser of foreign bytes: ``python -m tests.fuzzing --help``."""
