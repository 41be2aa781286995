"""Rescales the AlexNet-like network as the fine-tuned rows of later papers are (protocols.md 3.15).

So does philkr/magic_init, magic_init.py at commit 90551ed, with `-l WEIGHTS -cs`: layers that have
weights keep them up to one scale a layer, and new ones are normalized first. Both evaluations that
fine-tune this network on VOC2007 begin with it.
"""

from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor

from relloc.data.image_set import ImageSet
from relloc.data.subsets import evenly_spaced
from relloc.data.views import View
from relloc.errors import UsageError
from relloc.evaluation.contract import Context
from relloc.models.alexnet import AlexNetBackbone
from relloc.models.backbone import Backbone
from relloc.seeds import Use, seed_for
from relloc.transfer.alexnet import FineTunedAlexNet
from relloc.transfer.rescaling import equalize_rates, normalize_outputs

# magic_init.py's defaults: ten batches of 16 images, and a bias of 0.1 behind new layers.
_BATCHES = 10
_BATCH = 16
_MEAN = 0.1


def rescales(asked: bool | None, backbone: Backbone, setting: str) -> bool:
    """Returns whether the layers of a network with this backbone are rescaled.

    `asked` is the value of `rescale` of the evaluation that is configured at `setting`: None for
    where that is defined, which is for the AlexNet-like network.

    Raises:
        UsageError: it is asked for, and the network has batch norm.
    """
    is_defined = isinstance(backbone, AlexNetBackbone)
    if asked and not is_defined:
        raise UsageError(
            f"{setting}.rescale is true, but {type(backbone).__name__} has batch norm, which "
            "undoes every scale: give model=alexnet weights, or rescale=null"
        )
    return is_defined if asked is None else asked


def rescale_for_fine_tuning(network: FineTunedAlexNet, view: View, context: Context) -> None:
    """Rescales the layers of a network by views of training images.

    The last layer is drawn again afterwards, as train_cls.py of voc-classification does it.

    Raises:
        UsageError: a layer can't be rescaled.
        DataError: too many images can't be read.
    """
    network.eval()
    batches = list(_batches(view, context))
    normalize_outputs(network, network.new_layers(), batches, mean=_MEAN)
    gradient_seed = seed_for(Use.RESCALING_GRADIENT, context.seed)
    equalize_rates(network, batches[0], seed=gradient_seed)
    network.draw_last_layer()


def n_rescaling_images(images: ImageSet) -> int:
    """Returns on how many of the training images a network is rescaled."""
    return min(len(images), _BATCHES * _BATCH)


def _batches(view: View, context: Context) -> Iterator[Float[Tensor, "b 3 s s"]]:
    """Yields the batches of views that layers are rescaled by."""
    images = context.splits.train
    keys = []
    for index in evenly_spaced(len(images), _BATCHES * _BATCH):
        keys.append((index, seed_for(Use.RESCALING_VIEW, context.seed, index)))
    # Neighbors in a list may be alike, so each batch takes images from all of it.
    n_batches = -(-len(keys) // _BATCH)
    batches = [keys[number::n_batches] for number in range(n_batches)]
    what = f"rescaling by {images.name} {images.split}"
    read = context.encode_config.read(images, view, batches, n_batches, what)
    for batch in read:
        if len(batch.pixels):
            yield context.encode_config.to_device(batch.pixels)
