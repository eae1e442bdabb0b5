"""GLM-5.2's sparse attention in portable Triton, for GPUs its own kernels do not support.

Stands alone: needs torch and triton only, and nothing of glmplan but `errors`. One folder per operation, each with its
kernel, its plain PyTorch reference and a README that derives algorithm, bytes and tolerances.
"""
