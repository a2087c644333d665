"""`mmfm inspect`: what a corpus holds, whether it is still what was indexed, what a training run would get.

verify    every byte against the index
samples   every part decoded, a row a sample
counts    what the indexes tell, with nothing decoded
lines     what a person reads of it
page      the same with figures and a gallery
run       the command
"""
