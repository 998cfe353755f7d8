"""Seeded schedules of faults over a whole federation, with processes that are really killed.

``python -m simulations.faults`` draws schedules, plays them, and keeps what became of them in
``simulations/results/faults.json``.
"""
