"""Prompt sets, attacks on a model, judges of its answers, and the figures of what they say."""
