"""The cross-GPU batch normalization of §3.3.

Read ``batch_norm`` first, then ``functional``. ``registry`` adds the layer to Detectron2's norms.
``configure`` applies the config's keys to a model.
"""
