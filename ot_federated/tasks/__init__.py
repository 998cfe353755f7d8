"""What a model learns and how it is scored."""
