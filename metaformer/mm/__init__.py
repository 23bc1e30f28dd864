"""The backbone in OpenMMLab's toolboxes: one registration for mmdet and mmseg.

A config names ``metaformer.mm.detection`` or ``metaformer.mm.segmentation`` in its ``custom_imports``; each brings the
parts of this package that both share and adds its data sets. Importing them makes an uncaught ``InputError`` end the
program in its one sentence and exit status 2, since the toolboxes' own programs know nothing of it.
"""

from metaformer.errors import exit_on_input_error
from metaformer.mm import checkpoint, hooks
from metaformer.mm.backbone import MetaFormerBackbone

exit_on_input_error()

__all__ = ["MetaFormerBackbone", "checkpoint", "hooks"]
