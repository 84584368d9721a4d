"""Tools that show a GPU kernel right where there is no GPU; they need Triton, which CPU builds of torch do not bring.

interpreter          runs @triton.jit kernels on CPU tensors, with exact bf16, shuffled programs and checked bounds
interpreter_math     its arithmetic in numpy
fake_gpu             makes torch, Inductor and Triton believe in a GPU
generated            the code that Inductor generates for it: what it launches, and what it computes
generated_code       what is read off that code
interpreted_kernels  that code's kernels, interpreted or compiled
"""
