"""The judge: loading a vision language model, asking it, and the log-likelihood of its answers."""
