"""python -m relloc.evaluate ...: evaluates the features of any backbone."""

from omegaconf import DictConfig

from relloc.runs.start_command import start_command


def run(config: DictConfig) -> None:
    """Evaluates the checkpoints that `config` names."""
    # Imported here, since it loads torch, which --help does not need.
    from relloc.runs import build, evaluating, invocation

    evaluating.evaluate_checkpoint(build.evaluating(config), invocation.Invocation.of(config))


if __name__ == "__main__":
    start_command(run, "evaluate")
