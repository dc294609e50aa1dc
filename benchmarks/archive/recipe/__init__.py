"""What makes a prunAdag for minibatches: one setting at a time."""
