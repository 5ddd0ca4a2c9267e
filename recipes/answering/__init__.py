"""What `evaluate_*.py` share: a model that writes, files of answers, and what decides whether an answer is right."""
