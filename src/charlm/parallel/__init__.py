"""Several devices that share a batch, and several processes that train one run."""
