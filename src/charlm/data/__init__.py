"""From text to batches: files, downloads, vocabularies, encoded corpora in a cache, and the batches of training."""
