"""Server-side aggregation of adapters: Flower strategies."""
