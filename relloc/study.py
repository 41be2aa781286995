"""python -m relloc.study ...: looks at what a network sees, and at tricks that it may use."""

from omegaconf import DictConfig

from relloc.runs.start_command import start_command


def run(config: DictConfig) -> None:
    """Runs the studies that `config` names on the checkpoints that it names."""
    # Imported here, since it loads torch, which --help does not need.
    from relloc.runs import build, evaluating, invocation

    evaluating.evaluate_checkpoint(build.evaluating(config), invocation.Invocation.of(config))


if __name__ == "__main__":
    start_command(run, "study")
