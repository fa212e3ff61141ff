"""Talking to a model: its answers to what is typed, as they are written."""
