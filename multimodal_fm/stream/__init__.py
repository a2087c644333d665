"""The stream: what a run reads at each step, a pure function of its configuration, its seed and the step.

mixture         which sample is read when
dataset         `dataset[s]`: the samples of step s, read, arranged and dealt to microbatches
loader          steps read ahead by worker processes
worker_pool     the processes
shared_memory   carries steps between processes
crash_log       which sample crashed a process
quarantine      what could not be read, and when it is too much
token_counts    the tokens of samples, counted from the index
tasks           what the tasks of the configuration become
"""
