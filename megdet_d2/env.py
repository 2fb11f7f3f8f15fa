"""Registers the "CGBN" norm in a script that imports no plugin.

Set ``DETECTRON2_ENV_MODULE=megdet_d2.env``. Detectron2 then imports this module, and with it the
plugin, from its own set-up: that is, before ``import detectron2`` has finished. So no module
of the plugin may use ``detectron2.__version__``, the only name set after that point.
"""


def setup_environment() -> None:
    """Does nothing: the import has registered the norm, and Detectron2 wants such a function."""
