"""DETR, explained chapter by chapter in executed notebooks: this package is what those notebooks export.

The public names are looked up when they are first used (PEP 562), so that importing the package loads nothing else.
"""

__version__ = "0.1.0"

from importlib import import_module

_PUBLIC = {
    "AnchorDETR": "family.anchor",
    "ConditionalDETR": "family.conditional",
    "DABDETR": "family.dab",
    "DETR": "model",
    "DETRDemo": "model",
    "DINO": "family.dino",
    "DNDETR": "family.denoising",
    "DeformableDETR": "family.deformable",
    "FocalDETR": "family.focal",
    "HungarianMatcher": "matcher",
    "Preprocess": "data",
    "SMCADETR": "family.smca",
    "SetCriterion": "losses",
    "TrainConfig": "training",
    "TwoStageDETR": "family.two_stage",
    "check_data": "checks",
    "criterion_for": "losses",
    "detr_resnet101": "model",
    "detr_resnet101_dc5": "model",
    "detr_resnet18": "model",
    "detr_resnet50": "model",
    "detr_resnet50_dc5": "model",
    "detr_tiny": "model",
    "diagnose": "clinic",
    "download_bccd": "downloads",
    "download_coco": "downloads",
    "evaluate": "evaluation",
    "export_onnx": "export",
    "export_program": "export",
    "fit": "training",
    "freeze": "optimizer",
    "load_pretrained": "pretrained",
    "postprocess": "model",
    "predict_image": "pretrained",
    "pretrained_model": "pretrained",
    "rate_groups": "optimizer",
    "replace_head": "finetuning",
    "resize_queries": "finetuning",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
