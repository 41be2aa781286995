"""What a runner would give an evaluation, made of features, a backbone or splits."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from relloc.data.folder import FolderImages
from relloc.data.image_set import Splits
from relloc.data.views import View
from relloc.evaluation.contract import Context, NullState
from relloc.evaluation.run import NO_FEATURES
from relloc.features.source import ColorAugmentation, EncodeConfig, FeatureSource
from relloc.models.small import SmallBackbone


@dataclasses.dataclass(frozen=True, kw_only=True)
class MadeContext(Context):
    """A context whose random views are those of a source."""

    random_views: FeatureSource | None = None

    def augmented(self, view: View, color: ColorAugmentation | None) -> FeatureSource:
        return self.random_views or super().augmented(view, color)


def context(
    train: FeatureSource = NO_FEATURES,
    held_out: FeatureSource = NO_FEATURES,
    *,
    classes: Sequence[str] = (),
    **changes: Any,
) -> MadeContext:
    names = tuple(classes or map(str, range(train.n_classes)))
    train_images, held_out_images = (
        FolderImages(name="made", split=split, paths=[], labels=[], classes=names)
        for split in ("train", "val")
    )
    settings = {
        "backbone": SmallBackbone(widths=(8, 8, 8, 10, 8)).eval(),
        "splits": Splits(train=train_images, held_out=held_out_images),
        "encode_config": EncodeConfig(
            batch=16, workers=0, device=torch.device("cpu"), precision="fp32", unreadable_share=0.0
        ),
        "seed": 0,
        "state": NullState(),
        "folder": Path("nowhere"),
    }
    return MadeContext(train=train, held_out=held_out, **{**settings, **changes})
