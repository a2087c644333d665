"""Losses over tables that are too large to be held: every pair of a step's sequences, every id of a vocabulary.

Each works tile by tile and gives the gradients of the plain formula.
"""
