"""The backbone, data sets and hooks for OpenMMLab's mmdet and mmseg.

Configs name the modules that they need in ``custom_imports``. ``metaformer.mm.detection`` and
``metaformer.mm.segmentation`` register the classes of this package with mmengine, and ``metaformer.mm.patch_mmengine``
changes how mmengine reads checkpoints.
"""

from metaformer.mm.backbone import MetaFormerBackbone
