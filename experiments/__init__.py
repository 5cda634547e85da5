"""Ablations, neighbours, theory: each the shortest fork of the core."""
