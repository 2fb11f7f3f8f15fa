"""The schedule: linear scaling, warm-up and epoch policies (§3.2, §4).

``scaling`` has the arithmetic, ``build`` reads the config and builds Detectron2's scheduler.
"""
