"""The stream: what a run reads at each step, a pure function of its config, seed and step.

steps     `steps[s]`: items drawn from the mixture, read, arranged and dealt to microbatches
ruler     how many tokens an item has, told from the index
ledger    what could not be read, and when it is too much
journal   which item ended the program
shelves   a step on its way between processes
loader    steps read ahead, by threads or processes
"""
