from charlm.config import default_config


def get_config():
    config = default_config()
    return config
