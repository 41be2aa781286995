"""python -m relloc.train ...: pretrains, and evaluates the features beside random weights."""

from omegaconf import DictConfig

from relloc.runs.start_command import start_command


def run(config: DictConfig) -> None:
    """Pretrains a backbone as `config` says, then evaluates it."""
    # Imported here, since it loads torch, which --help does not need.
    from relloc.runs import build, invocation, pretraining

    pretraining.pretrain(build.pretraining(config), invocation.Invocation.of(config))


if __name__ == "__main__":
    start_command(run, "train")
