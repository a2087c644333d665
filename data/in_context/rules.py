"""What the sequences are, and what is best said of each: exact references to hold a model against.

P sequences, T symbols, n pairs, d dims.
"""

import numpy as np

KEYS, VALUES = "abcdefgh", "0123456789"
STATES = "abc"
PAIRS, LENGTH = 32, 64  # pairs of a recall, states of a chain
DIMS, POINTS = 4, 12  # of a regression


def draw_recall(draw):
    """Keys with the value that each has in this sequence alone, `a3f7a3...`: associative recall (Ba et al. 2016).

    A key that came before has the value that it had.
    """
    value_of = draw.integers(len(VALUES), size=len(KEYS))
    keys = draw.integers(len(KEYS), size=PAIRS)
    return "".join(KEYS[key] + VALUES[value_of[key]] for key in keys)


def shuffle_values(text, draw):
    """A recall whose values, but for the last pair's, are shuffled among its pairs: they teach nothing."""
    keys, values = text[::2], list(text[1:-1:2])
    shuffled = [values[i] for i in draw.permutation(len(values))]
    return "".join(key + value for key, value in zip(keys, [*shuffled, text[-1]], strict=True))


def count_occurrences(text):
    """How often each pair's key has come before (n,)."""
    keys = text[::2]
    return np.array([keys[:i].count(key) for i, key in enumerate(keys)])


def draw_chain(draw):
    """States of a Markov chain and its transitions, rows uniform over all distributions (Edelman et al. 2024)."""
    transitions = draw.dirichlet(np.ones(len(STATES)), size=len(STATES))
    state, states = draw.integers(len(STATES)), []
    for _ in range(LENGTH):
        states.append(state)
        state = draw.choice(len(STATES), p=transitions[state])
    return "".join(STATES[state] for state in states), transitions


def chain_references(text, transitions):
    """The nats of each state from the second on (T - 1,), of four who foretell it from those before.

    `truth` knows the transitions; `bigram` is the exact Bayesian, who counts transitions; `unigram` counts
    states alone; `uniform` guesses.
    """
    states = np.array([STATES.index(letter) for letter in text])
    count = len(STATES)
    pairs, singles = np.ones((count, count)), np.ones(count)  # the prior's one of each
    singles[states[0]] += 1
    nats = {"truth": [], "bigram": [], "unigram": [], "uniform": [np.log(count)] * (len(states) - 1)}
    for before, after in zip(states[:-1], states[1:], strict=True):
        nats["truth"].append(-np.log(transitions[before, after]))
        nats["bigram"].append(-np.log(pairs[before, after] / pairs[before].sum()))
        nats["unigram"].append(-np.log(singles[after] / singles.sum()))
        pairs[before, after] += 1
        singles[after] += 1
    return {name: np.array(values) for name, values in nats.items()}


def draw_regression(draw):
    """Rows x, y, x, y, ... (2 n, d + 1) of a linear function drawn anew (Garg et al. 2022).

    A y stands in the first column with zeros behind it; the last column is 1 where there is something to be foretold.
    """
    x, w = draw.standard_normal((POINTS, DIMS)), draw.standard_normal(DIMS)
    rows = np.zeros((2 * POINTS, DIMS + 1), np.float32)
    rows[::2, :DIMS] = x
    rows[1::2, 0], rows[1::2, DIMS] = x @ w, 1.0
    return rows


def shuffle_targets(rows, draw):
    """A regression whose y, but for the last one, are shuffled among the points."""
    shuffled = rows.copy()
    shuffled[1:-1:2] = rows[1:-1:2][draw.permutation(POINTS - 1)]
    return shuffled


def least_squares_errors(rows):
    """The squared error (n,) at each point of the least-squares solution, of least norm, of the points before it."""
    x, y = rows[::2, :DIMS].astype(float), rows[1::2, 0].astype(float)
    errors = []
    for k in range(len(x)):
        w = np.linalg.lstsq(x[:k], y[:k], rcond=None)[0] if k else np.zeros(DIMS)
        errors.append((x[k] @ w - y[k]) ** 2)
    return np.array(errors)
