"""What is asked of a model, and who says whether its answer is safe: sets, attacks, rules and judges."""
