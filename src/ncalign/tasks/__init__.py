"""Reasoning tasks, scored by what they ask for; programs run in a sandbox."""
