"""Importing this module changes mmengine for the whole process. Configs do so in ``custom_imports``.

- mmengine reads checkpoint files and downloads with :func:`metaformer.mm.checkpoint.load_from_path_or_url`, which
  executes nothing that a file contains and names a missing or damaged file in one sentence.
- An uncaught ``InputError`` prints its sentence and exits with status 2. The programs of mmdet and mmseg do not know
  this class and would print a traceback.
"""

from mmengine.runner import CheckpointLoader

from metaformer.errors import exit_on_input_error
from metaformer.mm.checkpoint import load_from_path_or_url

CheckpointLoader.register_scheme(prefixes=["", "http://", "https://"], loader=load_from_path_or_url, force=True)
exit_on_input_error()
