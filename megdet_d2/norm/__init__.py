"""Cross-GPU batch normalization (§3.3). Read batch_norm, then functional; registry is the seam to
Detectron2.
"""
