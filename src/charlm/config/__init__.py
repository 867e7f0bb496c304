"""The config of a run: every key (`defaults`), the rules that it must meet (`rules`), the command line (`cli`).

from charlm.config import default_config
"""

from charlm.config.defaults import LENGTH_KEYS, RESUMABLE_KEYS, default_config, flatten, to_json

__all__ = ["RESUMABLE_KEYS", "LENGTH_KEYS", "default_config", "flatten", "to_json"]
