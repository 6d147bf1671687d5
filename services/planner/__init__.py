"""The planner: knows what sequences may say next and which guesses are worth verifying; knows no model weights."""
