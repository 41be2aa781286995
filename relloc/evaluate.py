"""python -m relloc.evaluate ...: evaluates the features of any backbone."""

from omegaconf import DictConfig

from relloc.runs.start_command import start_command


def run(config: DictConfig) -> None:
    """Evaluates the checkpoints that `config` names."""
    # Imported here, since it loads torch, which --help does not need.
    from relloc.runs import build, checkpoint_watch, evaluating, invocation

    settings = build.evaluating(config)
    run_of_command = invocation.Invocation.of(config)
    if settings.watch:
        checkpoint_watch.watch_trainings(settings, settings.watch, run_of_command)
    else:
        evaluating.evaluate_checkpoint(settings, run_of_command)


if __name__ == "__main__":
    start_command(run, "evaluate")
