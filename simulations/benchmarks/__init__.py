"""Measurements behind the figures that README and notes quote: one command and one result file each."""
