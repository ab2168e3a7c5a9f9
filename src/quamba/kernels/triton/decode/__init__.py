"""The step of one token for one to four sequences, in the fewest launches that its sums allow.

Four or five kernels a block instead of one an op: the convolution's step ends the projection before it, the
recurrence gates its output and begins the rotation, the projection behind adds to the residual stream. Each
kernel reads what does not depend on the one before it, weights above all, before it waits for that one
(``kernels/triton/dependency.py``). ``runtime/fused_step.py`` puts them together.
"""
