"""The model's contracts, checked against a device by a small virtio driver of our own.

``contracts`` is the table, ``runner.conform`` goes through it, ``report`` shows what came of it.
"""
