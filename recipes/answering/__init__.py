"""Shared by `evaluate_answers.py` and `evaluate_glue.py`: a model that writes, files of answers, GLUE's figures."""
