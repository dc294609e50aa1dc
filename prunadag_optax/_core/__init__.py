"""Algorithm 2.1 of the article, and what it was made of for minibatches."""
