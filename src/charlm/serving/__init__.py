"""A trained model for others to use: the page that holds a model."""
