"""The step of one token for one to four sequences, in the fewest launches that its sums allow.

Four to six launches a block instead of one an op: the first projection may norm what it reads, the step of
the convolution ends it, the recurrence gates its output, the last projection adds to the residual stream.
Each kernel reads what does not depend on the one before it, weights above all, before it waits for that one
(``kernels/triton/dependency.py``). ``runtime/fused_step.py`` puts them together.
"""
