"""Data, teacher, student, scores: `python -m distill STAGE`. Trains the models of `engine` and never forks them."""
