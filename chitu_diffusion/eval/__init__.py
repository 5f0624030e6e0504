"""Scores of finished videos. A public module of this folder, but for manager.py, is a metric of that name."""
