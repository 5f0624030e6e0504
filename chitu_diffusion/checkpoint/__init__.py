"""Wan checkpoints on disk: where each layout keeps its files, how it spells names, and what sizes it has."""
