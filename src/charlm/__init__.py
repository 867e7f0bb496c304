"""Character-level recurrent language models in JAX: train, resume, score, sample and sweep from config files.

`python -m charlm` lists the commands. `charlm.config.default_config()` returns the config that a config file starts from.
"""
