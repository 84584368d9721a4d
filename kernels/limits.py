"""Sizes that the fused GPU kernels are made for; apart from them, as they import Triton and the passes ask without."""

# kernels/route.py keeps the tokens of a block in one program, and every program of the routed experts scans all ids:
# beyond, a grouped matmul of sorted tokens is better.
MAX_TOKENS = 1024
DENSE_TOKENS = 64  # dense over T; two accumulators of more than 64 x 64 spill registers
# Down projection dense over T: until here, multiplying every token costs a GPU no more time than reading the weights
# (an H100 does 295 operations of bf16 in the time of two bytes, an A100 156).
LISTED_TOKENS = 256
