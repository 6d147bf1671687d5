"""The features drafter's head in training: what `heddle distill` and the executor's distillation jobs share."""
