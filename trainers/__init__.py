"""The method: the training loop, its objective, the student and its LoRA."""
