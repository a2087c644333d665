"""The stream: what a run reads at each step, a pure function of its config, seed and step.

steps     `steps[s]`: samples drawn from the mixture, read, arranged and dealt to microbatches
ruler     how many tokens a sample has, told from the index
ledger    what could not be read, and when it is too much
journal   which sample ended the program
shelves   a step on its way between processes
loader    steps read ahead, by threads or processes
"""
