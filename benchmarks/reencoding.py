"""What packing changes: one network on the same crops from original files and from shards.

The shards must have been packed from the same folder, with settings that re-encode it (images
larger than short_px). Prints the difference of pixels, the pretext loss and accuracy on both
sources, and how far features of whole views turn (one minus cosine), layer by layer.
"""

from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from report import arguments, tell
from torch.nn.functional import cosine_similarity

from relloc.checkpoints import states
from relloc.data.crops import Crops
from relloc.data.folder import folder
from relloc.data.loader import load
from relloc.data.shards import shards
from relloc.data.views import Center, Views
from relloc.errors import UsageError
from relloc.features.pool import pooled_layers
from relloc.patches.normalize import ByDataset
from relloc.patches.pipeline import PatchPipeline
from relloc.pretext.relative_location import RelativeLocation
from relloc.results import LAYERS
from relloc.runs import build
from relloc.seeds import Use, seed_for

BATCH = 64


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--root", required=True, help="the folder of original images")
    parser.add_argument("--shards", required=True, help="what relloc.prepare made of it")
    parser.add_argument("--run", required=True, help="the run folder of a finished pretraining")
    options = parser.parse_args()
    sources = [
        folder(name="images", root=options.root, held_out_share=0.05).train,
        shards(root=options.shards).train,
    ]
    if [len(source) for source in sources] != [len(sources[0])] * 2:
        raise UsageError(f"{options.shards} holds other images than {options.root}")
    model, patches = network_of(options.run)
    crops = [
        _pixels(Crops(source, patches.grid, use=Use.CROP, seed=0, centered=False))
        for source in sources
    ]
    views = [_pixels(Views(source, Center(short_px=256, crop_px=224))) for source in sources]
    off = (crops[0].float() - crops[1].float()).abs()
    rows = [
        asked(model, patches, pixels, name)
        for name, pixels in zip(("files", "shards"), crops, strict=True)
    ]
    turned = turned_by(model, *views)
    rows.append({"source": "difference", "gray levels": off.mean().item()})
    rows += [{"source": f"1 - cosine, {layer}", "value": value} for layer, value in turned.items()]
    tell("re-encoding", rows, {}, options.json, settings=vars(options))


def network_of(run: str) -> tuple[RelativeLocation, PatchPipeline]:
    """Returns the network of a finished pretraining, and how its patches are made."""
    file = Path(run) / "config.yaml"
    config = OmegaConf.load(file)
    if not isinstance(config, DictConfig):
        raise UsageError(f"{file} holds a list, not the settings of a run")
    settings = build.pretraining(config)
    model = settings.network()
    saved = states.load_training(states.saved_trainings(Path(run))[-1])
    model.load_state_dict(saved["model"])
    return model.eval(), settings.patches


def _pixels(samples: Crops | Views) -> torch.Tensor:
    keys = [(index, seed_for(Use.CROP, 0, index)) for index in range(len(samples))]
    batches = [keys[start : start + BATCH] for start in range(0, len(keys), BATCH)]
    return torch.cat([batch.pixels for batch in load(samples, batches, workers=0, pin=False)])


@torch.no_grad()
def asked(
    model: RelativeLocation,
    patches: PatchPipeline,
    pixels: torch.Tensor,
    name: str,
) -> dict[str, object]:
    """Returns a row with the pretext loss and accuracy of a network on crops."""
    generator, questions = torch.Generator().manual_seed(0), model.questions
    outputs, truths = [], []
    for images in pixels.split(BATCH):
        drawn = patches.draw(len(images), generator)
        outputs.append(model(patches.make(images, *drawn)))
        truths.append(questions.truth(*drawn))
    answers, truth = torch.cat(outputs), torch.cat(truths)
    top1 = 100 * questions.hits(answers, truth).float().mean().item() / questions.n_questions
    return {
        "source": name,
        "images": len(pixels),
        "loss": questions.loss(answers, truth).item(),
        "top-1 %": top1,
    }


@torch.no_grad()
def turned_by(model: RelativeLocation, one: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """Returns one minus the cosine of features of two versions of views, by layer."""
    sums = dict.fromkeys(LAYERS, 0.0)
    for pair in zip(one.split(BATCH), other.split(BATCH), strict=True):
        features = [
            pooled_layers(model.backbone, ByDataset()(images.float()), LAYERS) for images in pair
        ]
        for layer in LAYERS:
            sums[layer] += (
                (1 - cosine_similarity(features[0][layer], features[1][layer])).sum().item()
            )
    return {layer: total / len(one) for layer, total in sums.items()}


if __name__ == "__main__":
    main()
