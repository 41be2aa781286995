"""Refuses trainings before they begin whose images are too small for the grid of patches."""

from relloc import ranks
from relloc.data.image_set import Splits
from relloc.data.processes import without_named_progress
from relloc.data.sizes import images_smaller_than
from relloc.errors import DataError
from relloc.runs import console
from relloc.runs.command_settings import Pretraining

# Images that are too small are refused in a sample where they are so many times those allowed.
_SAMPLES_MARGIN = 1.5


def check_sizes(settings: Pretraining, data: Splits) -> None:
    """Checks before a training that images which are not resized can hold the grid of patches.

    A training would meet held-out images that are too small after its end: the grid of their
    questions has three rows, whatever the trained one has.

    Raises:
        DataError: more images are too small than may be unreadable.
    """
    grid = settings.patches.grid
    # What a resize makes too small is refused with the settings, or is enlarged.
    if grid.resize is not None:
        return
    trained = settings.training_patches.grid
    asked = [grid]
    if settings.questions.columns_of_positions() is not None:
        asked.append(settings.patches.about_center.grid)
    largest_asked = max(asked, key=lambda each: each.span_px)
    progress = without_named_progress if ranks.rank() else console.progress_if_long
    for images, needed in ((data.train, trained), (data.held_out, largest_asked)):
        small = images_smaller_than(images, needed.span_px, progress)
        share = settings.data.unreadable_share
        # A sample may have some more of them than the whole set.
        if small.n_looked_at < len(images):
            share *= _SAMPLES_MARGIN
        if small.share <= share or small.first_size is None:
            continue
        height, width = small.first_size
        what = f"{needed.rows}x{needed.rows} patches"
        if needed.rows != trained.rows:
            what = f"the {what} of held-out questions, whatever grid.rows is,"
        raise DataError(
            f"grid.resize=null leaves images as large as they are, and {len(small.indices)} of "
            f"{small.n_looked_at} images of {images.name} {images.split} are smaller than the "
            f"{needed.span_px} px that {what} need; the first is "
            f"{images.source(small.indices[0])}: {width}x{height} px. Leave grid.resize=null out, "
            "so that images are enlarged, or make the grid smaller (grid.patch_px, grid.gap_px, "
            "grid.jitter_px)"
        )
