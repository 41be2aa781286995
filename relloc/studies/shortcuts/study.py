"""Which tricks could solve the pretext task, and does a network use them?"""

import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence

import torch
from PIL import Image

from relloc import checks
from relloc.data.image_set import Splits
from relloc.data.views import View
from relloc.errors import DataError, UsageError
from relloc.evaluation.contract import Context, Evaluation, PretextModel
from relloc.models.backbone import STAGES, Backbone
from relloc.patches.pipeline import Color
from relloc.results import Score
from relloc.studies.shortcuts.measurement import Measurement
from relloc.studies.shortcuts.picture import draw_findings
from relloc.studies.shortcuts.position import refuse_single_cell
from relloc.studies.shortcuts.questions import Strengths
from relloc.studies.shortcuts.reading import SinglePatches
from relloc.studies.shortcuts.scores import make_scores
from relloc.studies.shortcuts.tables import write_tables
from relloc.studies.shortcuts.verdicts import make_verdicts

_SETTING = "study.shortcuts"
_LEAST_IMAGES = 2
# Half of the noise is learned from and half is tested, and both need an image held back.
_LEAST_NOISE = 4
# The side of an image that a view is tried on
_CHECKED_PX = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shortcuts(Evaluation):
    """Audits of the shortcuts of the pretext task, by features and by questions to the network.

    Positions are read off the frozen features of single patches, and of the maps of whole images,
    by ridge regressions fitted on training images. The network of the pretext task is asked about
    held-out photographs and noise whose shortcuts are opened one at a time; this part is left out
    for weights without such a network. docs/studies.md describes each audit and its verdict.

    Attributes:
        layers: stages whose features positions are read off.
        view: of the whole images.
        batch: images that are read and asked about at once.
        n_images: held-out images, evenly spaced; all where there are fewer.
        train_images: training images that regressions are fitted on, likewise.
        noise_images: images of noise of each kind.
        patch_px, short_px: sides of single patches, and of the short sides of their images.
        patches_per_image: single patches of each image, an even number.
        network_epochs: also train a small network to find positions, for so many epochs; 0: do not.
        colors: color treatments by their names.
        lens, shift_px, border_px, jpeg_quality, jpeg_shift_px, smooth_px: see `Strengths`.
        negligible: effects below it, in points or percent, count as none where intervals allow it.

    Raises:
        UsageError: one of these is wrong.
    """

    kind = "study"
    labels = "none"
    version = 2  # 2: other verdicts, and other names of rows
    wants_pretext = True

    layers: Sequence[str]
    view: View
    batch: int = dataclasses.field(repr=False)  # decides no number
    n_images: int
    train_images: int
    noise_images: int
    patch_px: int
    short_px: int
    patches_per_image: int
    network_epochs: int
    colors: Mapping[str, Color]
    lens: Sequence[float]
    shift_px: int
    border_px: int
    jpeg_quality: int
    jpeg_shift_px: int
    smooth_px: float
    negligible: float

    def __post_init__(self) -> None:
        self.check_inputs(_SETTING)
        # The mean over feature5, which the study takes itself, is avgpool.
        checks.some_of(f"{_SETTING}.layers", self.layers, STAGES)
        checks.whole(f"{_SETTING}.n_images", self.n_images, at_least=_LEAST_IMAGES)
        checks.whole(f"{_SETTING}.train_images", self.train_images, at_least=_LEAST_IMAGES)
        checks.whole(f"{_SETTING}.noise_images", self.noise_images, at_least=_LEAST_NOISE)
        checks.whole(f"{_SETTING}.patch_px", self.patch_px)
        checks.whole(f"{_SETTING}.short_px", self.short_px, at_least=self.patch_px)
        # The easiest images are chosen by one half of the patches and measured on the other.
        checks.whole(f"{_SETTING}.patches_per_image", self.patches_per_image, at_least=2)
        checks.multiple(f"{_SETTING}.patches_per_image", self.patches_per_image, of=2)
        checks.whole(f"{_SETTING}.network_epochs", self.network_epochs, at_least=0)
        self._check_colors()
        checks.numbers(f"{_SETTING}.lens", self.lens, above=0, at_most=0.1)
        checks.increasing(f"{_SETTING}.lens", self.lens)
        checks.whole(f"{_SETTING}.shift_px", self.shift_px)
        checks.whole(f"{_SETTING}.border_px", self.border_px)
        checks.one_of(f"{_SETTING}.jpeg_quality", self.jpeg_quality, range(1, 101))
        checks.one_of(f"{_SETTING}.jpeg_shift_px", self.jpeg_shift_px, range(1, 8))
        checks.number(f"{_SETTING}.smooth_px", self.smooth_px, above=0)
        checks.number(f"{_SETTING}.negligible", self.negligible, above=0)

    def _check_colors(self) -> None:
        setting = f"{_SETTING}.colors"
        if not self.colors:
            raise UsageError(f"{setting} is empty: give one color treatment at least")
        for name, color in self.colors.items():
            if not isinstance(color, Color):
                raise UsageError(
                    f"{setting}.{name} is {color}: give a color treatment, "
                    "such as _target_: relloc.patches.color.Keep"
                )

    def check(self, splits: Splits) -> None:
        """Checks that there are images to fit regressions on and to test them.

        Raises:
            DataError: one of the splits has a single image or none.
        """
        for images in (splits.train, splits.held_out):
            if len(images) < _LEAST_IMAGES:
                raise DataError(
                    f"{_SETTING} needs {_LEAST_IMAGES} images at least, "
                    f"{images.name} {images.split} has {len(images)}"
                )

    @torch.no_grad()
    def check_network(self, backbone: Backbone) -> None:
        """Checks that each map of a view has several cells, whose places can be asked about.

        Raises:
            UsageError: a map has a single cell.
        """
        # Only shapes count, so that black images do.
        image = Image.new("RGB", (_CHECKED_PX, _CHECKED_PX))
        side_px = len(self.view(image, random.Random(0)))
        device = next(backbone.parameters()).device
        maps = backbone(torch.zeros(1, 3, side_px, side_px, device=device))
        for layer in self.layers:
            refuse_single_cell(layer, maps[layer], side_px=side_px)

    def run(self, context: Context) -> Iterator[Score]:
        """Yields accuracies, errors of positions, and the effect of each shortcut.

        The picture, the tables and the verdicts are written into the folder of the evaluation, and
        each verdict is printed.

        Raises:
            UsageError: the network's grid leaves no room for the border, or maps are too small.
            DataError: too many images can't be read, or none can.
        """
        if context.pretext is None:
            context.print_line(
                f"shortcuts of {context.checkpoint or 'these weights'}: only positions are read "
                "off features, since there is no network of the pretext task to ask"
            )
        elif context.asks_pretext:
            self._check_grid(context.pretext)
        else:
            context.print_line(
                f"shortcuts of {context.checkpoint or 'these weights'}: its network is asked under "
                "one batch norm alone, since it always answers under its own"
            )
        findings = self._measurement().measure(context)
        verdicts = make_verdicts(
            findings, context.pretext, self.strengths, negligible=self.negligible
        )
        scores = make_scores(findings, verdicts)
        for verdict in verdicts:
            context.print_line(f"        {verdict.sentence}")
        title = context.weights or "these weights"
        picture = context.folder / "shortcuts.png"
        draw_findings(findings, verdicts, self.strengths, picture, title=title)
        write_tables(scores, verdicts, context.folder)
        yield from scores

    @property
    def _single(self) -> SinglePatches:
        return SinglePatches(
            patch_px=self.patch_px, short_px=self.short_px, count=self.patches_per_image
        )

    def _measurement(self) -> Measurement:
        return Measurement(
            layers=self.layers,
            view=self.view,
            batch=self.batch,
            n_images=self.n_images,
            train_images=self.train_images,
            noise_images=self.noise_images,
            single=self._single,
            network_epochs=self.network_epochs,
            colors=self.colors,
            strengths=self.strengths,
        )

    @property
    def strengths(self) -> Strengths:
        """How strongly each shortcut is opened."""
        return Strengths(
            lens=tuple(self.lens),
            shift_px=self.shift_px,
            border_px=self.border_px,
            jpeg_quality=self.jpeg_quality,
            jpeg_shift_px=self.jpeg_shift_px,
            smooth_px=self.smooth_px,
        )

    def _check_grid(self, pretext: PretextModel) -> None:
        span = pretext.patches.grid.span_px
        # The pixels that a mirrored border shows lie inside of it.
        if 4 * self.border_px > span:
            raise UsageError(
                f"{_SETTING}.border_px is {self.border_px}: give at most {span // 4}, a quarter of "
                f"the grid of this network, which spans {span} px"
            )
