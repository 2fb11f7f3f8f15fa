"""``DETECTRON2_ENV_MODULE=megdet_d2.env``: the "CGBN" norm in a script that nobody edited.

Detectron2 imports this module, and the plugin with it, from its own set-up.
"""


def setup_environment() -> None:
    """Nothing: the import has registered the norm. Detectron2's own set-up would be circular."""
