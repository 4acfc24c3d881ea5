"""Training: the objective and its backward pass, the step, the loop."""
