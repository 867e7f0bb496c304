"""Import the modules that a config names, if the user wrote the config."""

from ml_collections import ConfigDict

from charlm.system.modules import import_module_of


def import_modules(config: ConfigDict) -> None:
    """Import the modules of a cell and of a corpus `module:name`. Not for the config of a workdir, which may be another's.

    Raises:
        ConfigError: a module cannot be imported.
    """
    import_module_of(config.model.cell, "cell")
    if config.data.path is None and config.data.url is None:
        import_module_of(config.data.corpus, "corpus")
