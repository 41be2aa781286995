"""python -m relloc.evaluate: any backbone through any evaluations."""

from omegaconf import DictConfig

from relloc.runs.launch import launch


def run(config: DictConfig) -> None:
    """Evaluate the checkpoints that `config` names."""
    from relloc.runs import build, evaluating, invocation  # torch loads here: --help does without

    evaluating.evaluate_checkpoint(build.evaluating(config), invocation.Invocation.of(config))


if __name__ == "__main__":
    launch(run, "evaluate")
