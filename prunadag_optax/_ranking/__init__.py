"""The k-th largest of a pytree, and exactly the k largest."""
