"""Federated Offsite-Tuning of foundation models.

A model owner sends a light adapter and a lossy, frozen emulator; data owners tune the adapter on data that never
leaves them; the owner joins their adapters and plugs the result into the full model.
"""

__version__ = "0.1.0"
