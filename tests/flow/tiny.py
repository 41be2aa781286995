"""Overrides that make a run a matter of seconds."""

# The photographs at a scale at which a run takes a second.
TINY = (
    *(
        "data.source.tiles=[0.4]",
        "data.source.stride=0.5",
        "recipe.images_per_step=16",
        "recipe.images_per_batch_norm=16",
    ),
    *("grid.patch_px=16", "grid.gap_px=4", "grid.jitter_px=2", "grid.resize.px=64"),
    *(
        "schedule.epochs=2",
        "schedule.warmup_epochs=0",
        "schedule.milestone_epochs=[1]",
        "report_every_steps=2",
    ),
    *(
        "view.short_px=64",
        "view.crop_px=56",
        "probe.linear.epochs=2",
        "probe.linear.milestone_epochs=[1]",
    ),
)
