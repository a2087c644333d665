"""Sequences of which the rule must be learned in context: recall, Markov chains, linear regression."""
