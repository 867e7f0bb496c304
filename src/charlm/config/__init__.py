"""The config of a run: all keys (`defaults`), the rules for their values (`rules`), and the command line (`cli`).

from charlm.config import default_config
"""

from charlm.config.defaults import LENGTH_KEYS, RESUMABLE_KEYS, default_config, flatten, to_json

__all__ = ["RESUMABLE_KEYS", "LENGTH_KEYS", "default_config", "flatten", "to_json"]
