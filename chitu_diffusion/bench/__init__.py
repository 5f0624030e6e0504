"""Measurements that a user can run: one module a subject, each a verb of `chitu bench`."""
