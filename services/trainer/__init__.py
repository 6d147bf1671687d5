"""The trainer: keeps the table of finetuning jobs and drives each of them, step by step, through an executor."""
