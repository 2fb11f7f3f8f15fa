"""Linear scaling, warm-up and epoch policies (§3.2, §4): scaling is the arithmetic, build the
seam to Detectron2.
"""
