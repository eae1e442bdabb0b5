"""glmplan sizes, plans and launches GLM-5.2 on the GPUs you have."""

__version__ = "0.1.0"
